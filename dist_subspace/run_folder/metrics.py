"""RUN/metrics.jsonl: one JSON object per logged step, on disk line by line. Local: rank 0 alone writes, everyone may read.

A training line has the keys of `StepRecord`; an evaluation line has `step` and keys that begin with `eval_`. NaN and
infinities are written as null, which every JSON reader takes; so a null loss means "not finite".
A run that resumes at step s writes the steps after s again: lines beyond s are dropped first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from dist_subspace.atomic_files import json_ready, storage_error, write_text_atomic
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.records import EVALUATED, Evaluation, StepRecord

Line = dict[str, Any]


def read_lines(run_dir: StrPath) -> list[Line]:
    """Every whole line in file order. A line that is no JSON object with a step (the last, cut by a kill) is left out."""
    try:
        text = RunFolder(run_dir).metrics.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for raw in text.splitlines() if (line := _parsed(raw)) is not None]


def training_lines(lines: Sequence[Line]) -> list[StepRecord]:
    return [StepRecord.of_line(line) for line in lines if "loss" in line]


def evaluation_lines(lines: Sequence[Line]) -> list[Evaluation]:
    return [Evaluation.of_line(line) for line in lines if any(key.startswith(EVALUATED) for key in line)]


class MetricsWriter:
    """Appends to RUN/metrics.jsonl after dropping every line with a step above `resume_step` (0: a new file).

    Raises:
        StorageError: the file cannot be rewritten. Every line is flushed to the kernel, so a killed process loses none.
    """

    def __init__(self, run_dir: StrPath, resume_step: int = 0) -> None:
        path = self._path = RunFolder(run_dir).metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(run_dir) if line["step"] <= resume_step] if resume_step > 0 else []
        write_text_atomic(path, "".join(_text(line) for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord | Evaluation) -> None:
        """One line.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            self._file.write(_text(record.as_line()))
            self._file.flush()
        except OSError as error:
            raise storage_error(self._path, error) from error

    def sync(self) -> None:
        """Wait until every line is on disk: a checkpoint is to be found with the lines of its steps.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(line), allow_nan=False) + "\n"


def _parsed(raw: str) -> Line | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
