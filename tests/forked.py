"""Processes of their own without the seconds of their imports: forked from one that has imported, and done nothing else.

Who asks for one from a script of its own guards the script's work by `if __name__ == "__main__"`, as for any process that
`multiprocessing` does not fork from the script itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORKING = get_context("forkserver")
FORKING.set_forkserver_preload(["tests.forked_imports"])


def forked(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process that calls `function(*args)`; it is a child of the one that imported, which ends with this process."""
    with _environment_of_imports():
        ensure_running()
    process = FORKING.Process(target=_begin, args=(function, *args))
    process.start()
    return process


def renew_threads() -> None:
    """In a forked process, before anything else: torch makes its pool of threads anew at its first use there, and of two threads
    that come to it at once one fails ("Invalid thread pool!"). transformers loads weights by several."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _begin(function: Callable[..., None], *args: Any) -> None:
    renew_threads()
    function(*args)


@contextmanager
def _environment_of_imports() -> Iterator[None]:
    """What libraries read when they are imported, and where `tests` is found."""
    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_lines(lines: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Lines of Python in a process of their own: its exit status (negative: a signal), and what it wrote."""
    with tempfile.TemporaryDirectory(prefix="lines-") as folder:
        process = forked(_run_lines, lines, folder, dict(os.environ))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, errors = (Path(folder, name).read_text(errors="replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(lines, process.exitcode or 0, out, errors)


def _run_lines(lines: str, folder: str, environment: dict[str, str]) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    exec(compile(lines, "lines", "exec"), {"__name__": "lines"})
    sys.stdout.flush()
