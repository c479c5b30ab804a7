"""Every model family of transformers, small and odd, against transformers itself: `python -m tests.families --help`."""
