"""A source is tokenised in pieces of so many records; each is one file, kept until all are there.

A run that is killed while it tokenises leaves its pieces in a hidden folder beside the cache, named by everything that
they depend on. The next run goes on behind them. A piece has the same bytes whichever process made it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError  # of numpy's reader, for a header that is damaged
from typing import Any

import numpy as np

from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.formats import FORMATS
from dist_subspace.training.data.samples import Outcome
from dist_subspace.training.data.settings import DataSettings

RECORDS = 512
"""Records of a piece, tokenised in one call."""
ARRAYS = ("ids", "trained", "lengths", "targets", "records", "dropped", "seen")


def tokenised(
    records: list[dict[str, Any]], first: int, source: str, settings: DataSettings, encoder: Encoder
) -> bytes:
    """The piece of records `first`, `first` + 1, ... of a source.

    Raises:
        UsageError: a record cannot be used.
    """
    rows = [Row(record, first + place, source, settings) for place, record in enumerate(records)]
    outcomes = FORMATS[settings.format](rows, encoder)
    return _packed([(row.number, outcome) for row, row_outcomes in zip(rows, outcomes) for outcome in row_outcomes])


def _packed(outcomes: list[tuple[int, Outcome]]) -> bytes:
    kept = [(number, outcome, outcome.sample) for number, outcome in outcomes if outcome.sample is not None]
    samples = [sample for _, _, sample in kept]
    remarks = Counter(remark for _, outcome in outcomes for remark in outcome.remarks)
    facts = {"labels": [sample.label for sample in samples], "remarks": dict(sorted(remarks.items()))}
    arrays: dict[str, Any] = {
        "ids": np.concatenate([np.asarray(s.ids, np.int32) for s in samples]) if samples else np.zeros(0, np.int32),
        "trained": np.concatenate([np.asarray(s.trained, bool) for s in samples]) if samples else np.zeros(0, bool),
        "lengths": np.asarray([len(s.ids) for s in samples], np.int64),
        "targets": np.asarray([s.targets or int(s.label is not None) for s in samples], np.int32),
        "records": np.asarray([number for number, _, _ in kept], np.int64),
        "dropped": np.asarray([outcome.dropped for _, outcome, _ in kept], np.int32),
        "seen": np.asarray([outcome.length for _, outcome in outcomes], np.int32),
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
    }
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # no pickle: plain arrays only
    return stream.getvalue()


class Pieces:
    """The pieces of one source on disk, numbered from 0."""

    def __init__(self, cache: Path, key: str) -> None:
        self.folder = cache / f".parts-{key[:24]}"

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        return self._file(number).is_file() and self._read(number) is not None

    def put(self, number: int, piece: bytes) -> None:
        """The piece is kept whole or not at all; another process may put the same piece meanwhile."""
        hidden = self.folder / f"{number:08}.{secrets.token_hex(8)}"  # no process id: another host may have the same
        hidden.write_bytes(piece)
        os.replace(hidden, self._file(number))

    def all(self, count: int) -> Iterator[dict[str, Any]]:
        """The first `count` pieces, in order."""
        for number in range(count):
            piece = self._read(number)
            if piece is None:
                raise OSError(f"{self._file(number)} cannot be read again")
            yield piece

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08}.npz"

    def _read(self, number: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, RuntimeError, TokenError, zipfile.BadZipFile):
            with np.load(self._file(number), allow_pickle=False) as stored:
                arrays: dict[str, Any] = {name: stored[name] for name in ARRAYS}
                return arrays | json.loads(stored["facts"].tobytes())
        return None
