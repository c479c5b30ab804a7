"""Processes that tokenise beside this one, where a source is large: fresh ones, which know nothing of this process' device,
process group or signals, and end with it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from dist_subspace.errors import UsageError
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.worker import PIECE, READY, receive

MOST = 16
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a worker is no rank


def free_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Worker processes for one source. `give` takes a piece to tokenise; `put(number, bytes)` is called when it is done."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        digest: str,
        source: str,
        count: int,
        put: Callable[[int, bytes], None],
        folder: Path | None = None,
    ) -> None:
        """`folder`: where the tokenizer's files are put for the workers; a temporary one if None."""
        self._store, self._source = put, source
        self._tasks: queue.Queue[tuple[int, bytes] | None] = queue.Queue(maxsize=2 * count)
        self._lock, self._ready, self._left = threading.Lock(), 0, count
        self._busy: set[int] = set()
        self._failures: dict[int, str] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="dist-subspace-tokenizer-", dir=folder))
        tokenizer.save_pretrained(self._folder)
        kind = [type(tokenizer).__module__, type(tokenizer).__qualname__]
        task = {"settings": asdict(settings), "tokenizer": digest, "class": kind, "source": source}
        (self._folder / "task.json").write_text(json.dumps(task), "utf-8")
        started = [self._start() for _ in range(count)]
        self.processes = [process for process, _ in started]
        self._threads = [threading.Thread(target=self._serve, args=pair, daemon=True) for pair in started]
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether a worker has come up that has the same tokenizer."""
        return self._ready > 0

    @property
    def has_room(self) -> bool:
        """Whether `give` takes a piece at once, for a worker that has come up."""
        return self.ready and not self._tasks.full()

    def give(self, number: int, first: int, records: list[dict[str, Any]], poll: Callable[[], None]) -> bool:
        """Hand a piece over, waiting for room; False where it cannot be (a record that is no JSON, no worker).

        Raises:
            UsageError: a record was refused, or a worker has died.
        """
        try:
            body = json.dumps({"first": first, "records": records}).encode() + b"\n"
        except (TypeError, ValueError):
            return False
        while True:
            poll()
            self._raise_failure()
            if not self._left:
                return False
            try:
                self._tasks.put((number, body), timeout=0.2)
                return True
            except queue.Full:
                continue

    def finish(self, poll: Callable[[], None]) -> None:
        """Wait until all that was given is done."""
        for _ in self._threads:
            self._send_end(poll)
        while any(thread.is_alive() for thread in self._threads):
            poll()
            self._raise_failure()
            self._threads[0].join(0.05)
            self._threads = [thread for thread in self._threads if thread.is_alive()] or self._threads[:1]
        self._raise_failure()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            process.kill()
            process.wait()
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self.processes:
            self._tasks.put(None)  # for threads that wait for a task
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send_end(self, poll: Callable[[], None]) -> None:
        while self._left:
            poll()
            self._raise_failure()
            try:
                self._tasks.put(None, timeout=0.2)
                return
            except queue.Full:
                continue

    def _raise_failure(self) -> None:
        if self._failures:
            # Pieces are taken in order: once those before it are done, the first failure is known.
            while any(number < min(self._failures) for number in set(self._busy)):
                time.sleep(0.01)
            raise UsageError(self._failures[min(self._failures)])

    def _start(self) -> tuple[subprocess.Popen[bytes], BinaryIO]:
        environment = {key: value for key, value in os.environ.items() if key not in HIDDEN}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        answers, worker_end = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_subspace.training.data.worker", str(self._folder), str(worker_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[worker_end],
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process to hear
        )
        os.close(worker_end)
        return process, os.fdopen(answers, "rb")

    def _serve(self, process: subprocess.Popen[bytes], answers: BinaryIO) -> None:
        with answers:
            frame = receive(answers)
            with self._lock:
                self._ready += frame is not None and frame[0] == READY
            if frame is not None:
                while not self._failures and (task := self._tasks.get()) is not None:
                    self._hand_over(process, answers, *task)
        with self._lock:
            self._left -= 1

    def _hand_over(self, process: subprocess.Popen[bytes], answers: BinaryIO, number: int, body: bytes) -> None:
        assert process.stdin is not None
        self._busy.add(number)
        try:
            process.stdin.write(body)
            process.stdin.flush()
            frame = receive(answers)
            if frame is None:
                raise BrokenPipeError
            if frame[0] == PIECE:
                self._store(number, frame[1])
            else:
                self._failures[number] = frame[1].decode()
        except BrokenPipeError:
            self._failures[number] = (
                f"{self._source}: a process that tokenised it ended (status {process.wait()}), perhaps for want of memory; "
                "what is tokenised is kept: run the same command again"
            )
        except OSError as error:
            self._failures[number] = f"data.cache_dir cannot be written: {error.strerror or error}"
        finally:
            self._busy.discard(number)
