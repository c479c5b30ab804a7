"""Applies each mutant to a copy of the tree and sees whether its tests turn red."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
# pytest's exit codes: https://docs.pytest.org/en/stable/reference/exit-codes.html
GREEN, RED = 0, 1
SECONDS_PER_TEST = 300  # a cold start of torch, transformers and deepspeed on a busy machine takes up to 60


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `caught`, `missed`, `hung`, or `unfit` (its tests could not be judged)."""

    mutant: Mutant
    verdict: str
    seconds: float
    output: str


def tests_that_are_red_without_any(mutants: Sequence[Mutant], tree: Path) -> str:
    """The output of the mutants' tests on the untouched `tree`, empty where all are green."""
    names = sorted({test for mutant in mutants for test in mutant.tests})
    code, output = _pytest(names, tree, SECONDS_PER_TEST + 30 * len(names), stop_at_first=False)
    return "" if code == GREEN else output


def outcomes(mutants: Sequence[Mutant], workers: int) -> Iterator[Outcome]:
    """One after another as they are ready; `workers` copies of the tree are broken side by side."""
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="dist_subspace-mutants-") as folder:
        for number in range(workers):
            trees.put(copy_of_the_tree(Path(folder) / str(number)))
        with ThreadPoolExecutor(workers) as pool:
            for done in as_completed([pool.submit(_judged, mutant, trees) for mutant in mutants]):
                yield done.result()


def copy_of_the_tree(target: Path) -> Path:
    """Tracked files, and those that git would track, as they are in the working tree."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _judged(mutant: Mutant, trees: SimpleQueue[Path]) -> Outcome:
    tree = trees.get()
    start = time.monotonic()
    try:
        with _broken(mutant, tree):
            code, output = _pytest(mutant.tests, tree, SECONDS_PER_TEST * len(mutant.tests), stop_at_first=True)
    finally:
        trees.put(tree)
    verdict = {GREEN: "missed", RED: "caught", None: "hung"}.get(code, "unfit")
    return Outcome(mutant, verdict, time.monotonic() - start, output)


@contextmanager
def _broken(mutant: Mutant, tree: Path) -> Iterator[None]:
    before = mutant.written_into(tree)
    try:
        yield
    finally:
        (tree / mutant.file).write_text(before, encoding="utf-8")


def _pytest(names: Sequence[str], tree: Path, seconds: float, stop_at_first: bool) -> tuple[int | None, str]:
    """Exit code (None: it did not end in time and was killed with its children) and output."""
    data = os.environ.get("DIST_SUBSPACE_DATA", str(ROOT.parent / "shared" / "data"))
    # No bytecode: a mutant of the same length, written within the second, would be taken for the module before it.
    wanted = {"PYTHONPATH": str(tree), "DIST_SUBSPACE_DATA": data, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(["-x"] if stop_at_first else []),
        *names,
    ]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | wanted,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
