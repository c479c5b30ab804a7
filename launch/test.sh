#!/usr/bin/env bash
# All checks in a prepared environment: ruff, mypy, pytest.
#   launch/test.sh [--slow] [pytest arguments ...]      --slow: the long tests too
#   launch/test.sh --gpu [pytest arguments ...]         on a machine with a GPU: the tests that need it, and nothing else
#   launch/test.sh --cluster [pytest arguments ...]     as root: real launchers on hosts made here, and nothing else
#   launch/test.sh --mutants [arguments ...]            breaks the product in many places; see tests/mutants/__main__.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test ${EXTRAS:-}" . launch/environment.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

markers="not slow and not cluster"
case "${1:-}" in
--slow)
    markers="not cluster"
    shift
    ;;
--gpu)
    shift
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "launch/test.sh --gpu needs a CUDA device that torch sees; there is none" >&2; exit 2; }
    # Workers share the device; each has its own memory of it, a few hundred MiB.
    exec python -m pytest -n auto --maxprocesses 8 --dist worksteal -m gpu "$@" tests/gpu
    ;;
--cluster)
    shift
    # One after another: each test's ranks are as many processes as it names.
    exec python -m pytest -m cluster -p no:xdist "$@" tests/cluster
    ;;
--mutants)
    shift
    exec python -m tests.mutants "$@"
    ;;
esac

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}

check_if_there() {
    if command -v "$1" >/dev/null; then check "$@"; else echo "== $1 is not installed: left out"; fi
}

check ruff check .
check ruff format --check .
check python -m mypy
check_if_there shellcheck -x launch/*.sh launch/slurm.sbatch
check_if_there hadolint launch/Dockerfile
echo "== pytest"
# Last, so that its summary closes the output; the other checks' verdicts are repeated before it only when they failed.
status=0
[ ${#failed[@]} -eq 0 ] || echo "FAILED before pytest: $(IFS=,; echo "${failed[*]}")"
# A file's tests stay in one worker: they share models and processes. Distributed tests start two or three ranks besides.
# One worker more than cores: some tests wait most of their time, for ranks that are lost.
workers="$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0)) + 1))')"
python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m "$markers" "$@" || status=$?
[ ${#failed[@]} -eq 0 ] || status=1
exit "$status"
