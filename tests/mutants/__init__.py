"""Breakages of the product that the suite has to notice: `python -m tests.mutants`, or `launch/test.sh --mutants`."""
