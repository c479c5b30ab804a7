"""Tokenised samples on disk: flat columns as .npy files, memory-mapped, beside a JSON that says what they hold.

A folder appears by one rename from a name that begins with a dot, so a run that is killed while it tokenises leaves
nothing that a later one would take for whole. A folder whose sizes contradict its JSON is made anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_subspace.errors import UsageError
from dist_subspace.training.data.samples import Sample

COLUMNS = ("ids", "trained", "offsets", "targets", "records", "classes")


@dataclass(frozen=True)
class Columns:
    """The samples of one source: n samples, t tokens in all."""

    ids: np.ndarray
    """(t,) int32 token ids, sample after sample."""
    trained: np.ndarray
    """(t,) bool: the token is a target (position 0 of a sample counts as none whatever it says here)."""
    offsets: np.ndarray
    """(n + 1,) int64: sample i is ids[offsets[i] : offsets[i + 1]]."""
    targets: np.ndarray
    """(n,) int32: how many targets each sample has."""
    records: np.ndarray
    """(n,) int64: from which record of the source it comes."""
    classes: np.ndarray
    """(n,) int32: place of its label in `labels` (0 where there are none)."""
    labels: list[str | int]
    left_out: int
    """Samples that did not fit into `max_length`."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def read_columns(folder: Path) -> Columns | None:
    """The columns of a folder, memory-mapped; None where there is none, or one that is not whole."""
    try:
        facts = json.loads((folder / "columns.json").read_text("utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS}
    except (OSError, ValueError, EOFError):
        return None
    columns = Columns(**arrays, labels=facts["labels"], left_out=facts["left_out"])
    whole = (len(columns), len(columns.ids)) == (facts["samples"], facts["tokens"]) == _sizes(columns)
    return columns if whole else None


def write_columns(folder: Path, samples: Iterable[tuple[int, Sample | None]], facts: dict[str, Any]) -> None:
    """Write (record number, sample or None for one left out) to `folder`; `facts` is kept in its JSON as it stands.

    Raises:
        UsageError: the cache folder cannot be written, or no sample is left.
    """
    arrays, labels, left_out = _collected(samples)
    if not len(arrays["targets"]):
        why = f"{left_out} had an answer longer than that, or none" if left_out else "its records hold no text"
        raise UsageError(f"{facts['source']}: no sample is left with data.max_length {facts['max_length']}: {why}")
    counts = {"samples": len(arrays["targets"]), "tokens": len(arrays["ids"]), "left_out": left_out, "labels": labels}
    with _appearing(folder) as hidden:
        for name, array in arrays.items():
            np.save(hidden / f"{name}.npy", array, allow_pickle=False)
        (hidden / "columns.json").write_text(json.dumps(facts | counts, indent=1), "utf-8")


def _collected(samples: Iterable[tuple[int, Sample | None]]) -> tuple[dict[str, np.ndarray], list[str | int], int]:
    ids, trained, lengths, targets, records, classes = [], [], [0], [], [], []
    labels: dict[str | int, int] = {}
    left_out = 0
    for record, sample in samples:
        if sample is None:
            left_out += 1
            continue
        ids.append(np.asarray(sample.ids, np.int32))
        trained.append(np.asarray(sample.trained, bool))
        lengths.append(len(sample.ids))
        targets.append(1 if sample.label is not None else sample.targets)
        records.append(record)
        classes.append(0 if sample.label is None else labels.setdefault(sample.label, len(labels)))
    arrays = {
        "ids": np.concatenate(ids) if ids else np.zeros(0, np.int32),
        "trained": np.concatenate(trained) if trained else np.zeros(0, bool),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "targets": np.asarray(targets, np.int32),
        "records": np.asarray(records, np.int64),
        "classes": np.asarray(classes, np.int32),
    }
    return arrays, list(labels), left_out


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    except OSError as error:
        raise UsageError(
            f"data.cache_dir is {str(folder.parent)!r}, which cannot be written: {error.strerror}"
        ) from error
    try:
        yield hidden
        if folder.exists() and read_columns(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(hidden, folder)
        except OSError:
            # Another process tokenised the same content meanwhile; its folder holds the same bytes.
            if read_columns(folder) is None:
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _sizes(columns: Columns) -> tuple[int, int]:
    return len(columns.offsets) - 1, int(columns.offsets[-1])
