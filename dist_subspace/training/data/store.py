"""Tokenised samples on disk: flat columns as .npy files, memory-mapped, beside a JSON that says what they hold.

A folder appears by one rename from a name that begins with a dot, after everything in it is on disk, so a run that is killed
while it tokenises leaves nothing that a later one would take for whole. A folder that contradicts its JSON is made anew.
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
from tokenize import TokenError  # of numpy's reader, for a header that is damaged
from typing import Any

import numpy as np

from dist_subspace.atomic_files import make_folder, sync
from dist_subspace.errors import UsageError
from dist_subspace.training.data.fingerprint import digest

COLUMNS = ("ids", "trained", "offsets", "targets", "records", "classes", "dropped", "seen")


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
    dropped: np.ndarray
    """(n,) int32: tokens that each sample lost to `max_length`."""
    seen: np.ndarray
    """(m,) int32: tokens of each sample before anything was cut, those that are left out among them; 0 without a target."""
    labels: list[str | int]
    remarks: dict[str, int]
    """What the run has to say of the records: sentences with {count}, and the count."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def left_out(self) -> int:
        """Samples that did not fit into `max_length`, or had nothing to train."""
        return len(self.seen) - len(self)


def read_columns(folder: Path) -> Columns | None:
    """The columns of a folder, memory-mapped; None where there is none, or one that is not whole: its sizes or its bytes (those
    of a column above 1 GiB in samples) are not those that were written. Folders of earlier versions hold no digests of bytes."""
    try:
        facts = json.loads((folder / "columns.json").read_text("utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS}
        columns = Columns(**arrays, labels=facts["labels"], remarks=facts["remarks"])
        is_whole = (len(columns), len(columns.ids)) == (facts["samples"], facts["tokens"]) == _sizes(columns)
        stored_digests = facts.pop("digests", None)
    except (OSError, ValueError, EOFError, KeyError, TypeError, TokenError):
        return None
    return columns if is_whole and (stored_digests is None or stored_digests == _digests(folder, facts)) else None


def write_columns(folder: Path, pieces: Iterable[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the pieces of a source (see pieces.py) to `folder`; `facts` is kept in its JSON as it stands.

    Raises:
        UsageError: the cache folder cannot be written, or no sample is left.
    """
    arrays, labels, remarks = _collected(pieces)
    if not len(arrays["targets"]):
        raise UsageError(
            f"{facts['source']}: no sample is left with data.max_length {facts['max_length']}: "
            f"{_why_none_is_left(arrays['seen'])}"
        )
    counts = {"samples": len(arrays["targets"]), "tokens": len(arrays["ids"]), "labels": labels, "remarks": remarks}
    counts["left_out"] = len(arrays["seen"]) - len(arrays["targets"])
    with _hidden_until_whole(folder) as hidden:
        for name, array in arrays.items():
            np.save(hidden / f"{name}.npy", array, allow_pickle=False)
        all_facts = facts | counts
        all_facts["digests"] = _digests(hidden, all_facts)
        (hidden / "columns.json").write_text(json.dumps(all_facts, indent=1), "utf-8")


def _digests(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    from dist_subspace.checkpoint.fingerprint import file_fingerprint  # brings torch, which no worker needs

    return {name: file_fingerprint(folder / f"{name}.npy") for name in COLUMNS} | {"facts": digest(facts)}


def _why_none_is_left(seen: np.ndarray) -> str:
    too_long = int(np.count_nonzero(seen))
    reasons = [f"{too_long} had an answer longer than that"] if too_long else []
    if len(seen) > too_long:
        reasons.append(f"{len(seen) - too_long} had nothing to train")
    return " and ".join(reasons) or "its records hold no text"


def _collected(pieces: Iterable[dict[str, Any]]) -> tuple[dict[str, np.ndarray], list[str | int], dict[str, int]]:
    parts_of_column: dict[str, list[np.ndarray]] = {}
    labels: dict[str | int, int] = {}
    classes: list[int] = []
    remarks: dict[str, int] = {}
    for piece in pieces:
        for name, array in piece.items():
            if isinstance(array, np.ndarray):
                parts_of_column.setdefault(name, []).append(array)
        classes += [0 if label is None else labels.setdefault(label, len(labels)) for label in piece["labels"]]
        for remark, count in piece["remarks"].items():
            remarks[remark] = remarks.get(remark, 0) + count
    arrays = {name: np.concatenate(parts) for name, parts in parts_of_column.items()}
    lengths = arrays.pop("lengths", np.zeros(0, np.int64))
    for name in COLUMNS:
        arrays.setdefault(name, np.zeros(0, np.int32))
    arrays["offsets"] = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
    arrays["classes"] = np.asarray(classes, np.int32)
    return arrays, list(labels), remarks


@contextlib.contextmanager
def _hidden_until_whole(folder: Path) -> Iterator[Path]:
    try:
        make_folder(folder.parent)
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
        hidden.chmod(0o755)  # tempfile's folders are their owner's alone, and a cache may be shared
    except OSError as error:
        raise UsageError(
            f"data.cache_dir is {str(folder.parent)!r}, which cannot be written: {error.strerror}"
        ) from error
    try:
        yield hidden
        for path in (*hidden.iterdir(), hidden):
            sync(path)
        if folder.exists() and read_columns(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(hidden, folder)
            sync(folder.parent)
        except OSError:
            # Another process tokenised the same content meanwhile; its folder holds the same bytes.
            if read_columns(folder) is None:
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _sizes(columns: Columns) -> tuple[int, int]:
    return len(columns.offsets) - 1, int(columns.offsets[-1])
