#!/usr/bin/env bash
# All checks in a prepared environment: ruff, mypy, pytest.
#   launch/test.sh [--slow] [pytest arguments ...]      --slow: the long tests too
#   launch/test.sh --mutants [arguments ...]            breaks the product in many places; see tests/mutants/__main__.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh test

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

if [ "${1:-}" = "--mutants" ]; then
    shift
    exec python -m tests.mutants "$@"
fi

markers="not slow"
if [ "${1:-}" = "--slow" ]; then
    markers=""
    shift
fi

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}

check ruff check .
check ruff format --check .
check python -m mypy
echo "== pytest"
# Last, so that its summary closes the output; the other checks' verdicts are repeated before it only when they failed.
status=0
[ ${#failed[@]} -eq 0 ] || echo "FAILED before pytest: $(IFS=,; echo "${failed[*]}")"
# A file's tests stay in one worker: they share models and processes. Distributed tests start two or three ranks besides.
python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder ${markers:+-m "$markers"} "$@" || status=$?
[ ${#failed[@]} -eq 0 ] || status=1
exit "$status"
