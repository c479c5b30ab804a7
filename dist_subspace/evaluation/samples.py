"""The samples that are measured: read and tokenised by rank 0 as training does it, and given to the others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.training.data import TokenTable, prepare, prepare_evaluation
from dist_subspace.training.data.cutting import Cutting
from dist_subspace.training.data.samples import Sample
from dist_subspace.training.data.settings import PAIRED, UNPAIRED
from dist_subspace.training.data.store import Columns
from dist_subspace.training.data.table import Part
from dist_subspace.training.sections import data_settings


@dataclass(frozen=True)
class Samples:
    """table: in the data's order, in memory; name, fingerprint: of the data; cutting: what became of samples that are too long,
    None for a held-out part, of which the training has said it; notices: sentences."""

    table: TokenTable
    name: str
    fingerprint: str
    cutting: Cutting | None
    notices: list[str]

    @property
    def records(self) -> np.ndarray:
        """(n,) from which record of the data each sample comes, counted from 1."""
        return np.concatenate([part.columns.records[part.rows] for part in self.table.parts])

    def trained(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each is a target) of a sample."""
        ids, labels = self.table.sample(number)
        return ids, labels >= 0


def read_samples(
    config: Config, tokenizer: Any, labels: list[str] | None, cache: Path | None, limit: int | None, show: bool
) -> Samples:
    """Local: what `data.eval` names, a file of its own or the part of the training data that was held out.

    Arguments:
        labels: the class names by id, as training had them.
        cache: where tokens are kept and found; None for nowhere.
        limit: of how many samples, the first ones; None for all.
        show: whether progress is shown.

    Raises:
        UsageError: no data to evaluate on, or what is wrong with it; a label that training never saw.
    """
    settings, task = data_settings(config.data), config.model.task
    if settings.format in (*PAIRED, *UNPAIRED):
        raise UsageError(
            f"data.format is {settings.format!r}, whose loss and rewards a run measures itself (its lines of eval_loss and "
            "eval_rewards); accepted: --data FILE of samples, with data.format=completion or another format of such"
        )
    if settings.eval is None:
        raise UsageError(
            "data.eval is null, and no --data is given; accepted: --data FILE, or data.eval in the configuration"
        )
    with tempfile.TemporaryDirectory() if cache is None else nullcontext(str(cache)) as folder:
        if isinstance(settings.eval, str):
            read = prepare_evaluation(settings, tokenizer, folder, show, task, labels)
            table, name, fingerprint = read.table, settings.eval, read.fingerprint
            return Samples(in_memory(table, limit), name, fingerprint, read.cutting, read.notices)
        prepared = prepare(settings, tokenizer, folder, config.training.seed, show, task)
        _check_labels(prepared.labels, labels)
        assert prepared.eval is not None  # a fraction was asked for
        name = f"the {settings.eval:g} held out of {', '.join(Path(path).name for path, _ in settings.sources())}"
        return Samples(in_memory(prepared.eval, limit), name, prepared.fingerprint, None, prepared.notices)


def _check_labels(found: list[str] | None, labels: list[str] | None) -> None:
    """Raises UsageError for training data that is no longer what the classes were made of."""
    if found != labels:
        missing = [label for label in found or [] if label not in (labels or [])]
        raise UsageError(
            f"data.train has the labels {', '.join((missing or found or [])[:8])} today, and the adapter was trained on "
            f"{', '.join((labels or [])[:8])}; accepted: the data of the training, or --data FILE"
        )


def in_memory(table: TokenTable, limit: int | None = None) -> TokenTable:
    """The same samples as arrays that need no file, which can be sent; of them the first `limit`."""
    count = len(table) if limit is None else min(limit, len(table))
    samples = [table.sample(number) for number in range(count)]
    records = np.concatenate([part.columns.records[part.rows] for part in table.parts])[:count]
    if table.classification:
        ids, classes = [ids for ids, _ in samples], np.array([int(label[0]) for _, label in samples], np.int32)
        return _table(ids, [np.zeros(len(i), bool) for i in ids], records, classes)
    return _table([ids for ids, _ in samples], [labels >= 0 for _, labels in samples], records, None)


def table_of(samples: Sequence[Sample], records: Sequence[int]) -> TokenTable:
    """Tokenised samples, each from one record, as a table in memory."""
    ids = [np.asarray(sample.ids, np.int64) for sample in samples]
    return _table(ids, [np.asarray(sample.trained, bool) for sample in samples], np.asarray(records, np.int64), None)


def _table(
    ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], records: np.ndarray, classes: np.ndarray | None
) -> TokenTable:
    lengths = np.array([len(i) for i in ids], np.int64)
    none = np.zeros(len(ids), np.int32)
    targets = none + 1 if classes is not None else np.array([int(t[1:].sum()) for t in trained], np.int32)
    columns = Columns(
        ids=np.concatenate(ids).astype(np.int32),
        trained=np.concatenate(trained),
        offsets=np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64),
        targets=targets,
        records=records,
        classes=none if classes is None else classes,
        dropped=none,
        seen=lengths.astype(np.int32),
        labels=[],
        remarks={},
    )
    # Classes are ids already: the table's own translation of them is the identity.
    identity = None if classes is None else np.arange(int(classes.max(initial=0)) + 1, dtype=np.int64)
    return TokenTable((Part(columns, np.arange(len(ids)), class_ids=identity),))
