"""Applies each mutant to a copy of the tree and sees whether its tests turn red."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
# pytest's exit codes: https://docs.pytest.org/en/stable/reference/exit-codes.html
GREEN, RED = 0, 1
SECONDS_PER_TEST = 300  # ranks are started anew for each mutant, which takes up to a minute on a busy machine


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `caught`, `missed`, `hung`, or `unfit` (its tests could not be judged)."""

    mutant: Mutant
    verdict: str
    seconds: float
    output: str


class Tree:
    """A copy of the tracked files, and of those that git would track, and a process that runs pytest in it."""

    def __init__(self, folder: Path) -> None:
        self.root, self._output = folder / "tree", folder / "output"
        _copy(self.root)
        # No bytecode: a mutant of the same length, written within the second, would be taken for the module before it.
        data = os.environ.get("DIST_SUBSPACE_DATA", str(ROOT.parent / "shared" / "data"))
        wanted = {"PYTHONDONTWRITEBYTECODE": "1", "DIST_SUBSPACE_DATA": data, "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            cwd=folder,
            env=os.environ | wanted | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, tests: Sequence[str], seconds: float, *options: str) -> tuple[int | None, str]:
        """pytest's exit status, None where it did not end in time, and its output."""
        arguments = ["-q", "-p", "no:cacheprovider", *options, *tests]
        request = {"tree": str(self.root), "arguments": arguments, "seconds": seconds, "output": str(self._output)}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code: int | None = json.loads(self._process.stdout.readline())
        return code, self._output.read_text(encoding="utf-8", errors="replace")

    @contextmanager
    def broken_by(self, mutant: Mutant) -> Iterator[None]:
        before = mutant.written_into(self.root)
        try:
            yield
        finally:
            (self.root / mutant.file).write_text(before, encoding="utf-8")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def red_without_any(mutants: Sequence[Mutant], workers: int) -> tuple[list[str], str]:
    """The mutants' tests that are red on the untouched tree, and the output of them. A file's tests stay together."""
    names = sorted({test for mutant in mutants for test in mutant.tests})
    files = sorted({name.partition("::")[0] for name in names})
    shares = [[n for n in names if files.index(n.partition("::")[0]) % workers == share] for share in range(workers)]
    red: list[str] = []
    told = ""
    with _trees(workers) as trees, ThreadPoolExecutor(workers) as pool:
        for share, code, output in pool.map(lambda share: _on(trees, share), filter(None, shares)):
            if code != GREEN:
                told += output
                failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.M)
                # Of a pytest that came to no summary, nothing is known.
                red += [n for n in share if any(f.startswith(n) for f in failed)] if failed else share
    return red, told


def outcomes(mutants: Sequence[Mutant], workers: int) -> Iterator[Outcome]:
    """One after another as they are ready; `workers` copies of the tree are broken side by side."""
    with _trees(workers) as trees, ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(_judged, mutant, trees) for mutant in mutants]):
            yield done.result()


@contextmanager
def _trees(number: int) -> Iterator[SimpleQueue[Tree]]:
    trees: SimpleQueue[Tree] = SimpleQueue()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dist_subspace-mutants-")))
        for index in range(number):
            tree = Tree(folder / str(index))
            stack.callback(tree.close)
            trees.put(tree)
        yield trees


def _on(trees: SimpleQueue[Tree], tests: Sequence[str]) -> tuple[Sequence[str], int | None, str]:
    tree = trees.get()
    try:
        return tests, *tree.run(tests, SECONDS_PER_TEST + 30 * len(tests))
    finally:
        trees.put(tree)


def _judged(mutant: Mutant, trees: SimpleQueue[Tree]) -> Outcome:
    tree = trees.get()
    start = time.monotonic()
    try:
        with tree.broken_by(mutant):
            code, output = tree.run(mutant.tests, SECONDS_PER_TEST * len(mutant.tests), "-x")
    finally:
        trees.put(tree)
    verdict = {GREEN: "missed", RED: "caught", None: "hung"}.get(code, "unfit")
    return Outcome(mutant, verdict, time.monotonic() - start, output)


def _copy(target: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
