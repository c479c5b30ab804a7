"""RUN/metrics.jsonl: one JSON object per logged step, on disk line by line. Local: rank 0 alone.

A training line has exactly the keys of `KEYS`, and `penalty` where the method has one (it is no part of `loss`); an
evaluation line has `step` and keys that begin with `eval_`. NaN and infinities are written as null, which every JSON reader
takes; so a null loss means "not finite".
A run that resumes at step s writes the steps after s again: lines beyond s are dropped first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dist_subspace.atomic_files import storage_error
from dist_subspace.checkpoint.store import json_ready, write_text_atomic
from dist_subspace.report.history import METRICS, read_lines

KEYS = (
    "step",
    "epoch",
    "samples",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "elapsed_seconds",
)
OPTIONAL = ("penalty",)


class MetricsWriter:
    """Appends to RUN/metrics.jsonl after dropping every line with a step above `resume_step` (0: a new file).

    Raises:
        StorageError: the file cannot be rewritten. Every line is flushed to the kernel, so a killed process loses none.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        path = self._path = Path(run_dir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(run_dir) if line["step"] <= resume_step] if resume_step > 0 else []
        write_text_atomic(path, "".join(_text(line) for line in kept))
        self._last = kept[-1] if kept else None
        self._file: TextIO = path.open("a", encoding="utf-8")

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest line that was kept from before the resume, for counters that continue (elapsed seconds)."""
        return self._last

    def step(self, record: Mapping[str, Any]) -> None:
        """A training line. ValueError unless the keys are `KEYS`, maybe with `OPTIONAL`; a value that is unknown is None."""
        wrong = sorted(set(record).difference(OPTIONAL) ^ set(KEYS))
        if wrong:
            raise ValueError(f"a line of {METRICS} has exactly the keys {', '.join(KEYS)}; missing or unknown: {wrong}")
        self._write({key: record[key] for key in (*KEYS, *OPTIONAL) if key in record})

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """An evaluation line: `eval_loss` and what else was measured. ValueError for a key without `eval_`."""
        wrong = [key for key in values if not key.startswith("eval_")]
        if wrong:
            raise ValueError(f"a line of an evaluation has keys that begin with eval_; got {wrong}")
        self._write({"step": step, **values})

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

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(_text(line))
            self._file.flush()
        except OSError as error:
            raise storage_error(self._path, error) from error


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(line), allow_nan=False) + "\n"
