"""From the configuration's data section to tables of tokens: tokenised once, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.loading.sentencepiece_tokenizer import added_beyond_pieces
from dist_subspace.training.data.chat import give_chat_template
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.formats import FORMATS
from dist_subspace.training.data.labels import class_ids, label_names
from dist_subspace.training.data.samples import Sample
from dist_subspace.training.data.settings import COLUMNS, DataSettings
from dist_subspace.training.data.sources import Source, open_source
from dist_subspace.training.data.store import Columns, read_columns, write_columns
from dist_subspace.training.data.table import TokenTable, hold_out, whole_table

LAYOUT = 1  # of the stored columns and of how text becomes tokens; a change makes old caches unread
BATCH = 512  # records tokenised in one call
TASKS = ("causal-lm", "classification")


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: TokenTable
    eval: TokenTable | None
    left_out: int
    """Training samples whose answer alone did not fit into `max_length`."""
    fingerprint: str
    """Equal for equal training data, tokens and held-out part; says nothing of paths."""
    labels: list[str] | None
    """Class names by id (classification)."""


def prepare(
    settings: DataSettings, tokenizer: Any, cache_dir: str | Path, seed: int, show_progress: bool, task: str
) -> Prepared:
    """Read, tokenise (or find tokenised in `cache_dir`) and divide the data of a run. Local: no collective.

    A second call with the same files, tokenizer and settings only maps what the first stored.

    Raises:
        UsageError: anything wrong with a file, a record, or the settings.
    """
    if task not in TASKS:
        raise unknown_name("model.task", task, TASKS)
    if (task == "classification") != (settings.format == "classification"):
        raise UsageError(
            f"data.format is {settings.format!r} and model.task {task!r}; classification goes with itself only"
        )
    if settings.format == "chat":
        give_chat_template(tokenizer)
    shelf = _Shelf(settings, tokenizer, Path(cache_dir), show_progress)
    sources = [open_source(path, settings.split) for path, _ in settings.sources()]
    weights = [weight for _, weight in settings.sources()]
    columns = [shelf.columns(source) for source in sources]
    names = label_names(columns) if task == "classification" else None
    table = whole_table(columns, weights, [_ids(c, names, s.name) for c, s in zip(columns, sources)])
    evaluation: TokenTable | None = None
    held: list[Any] = []
    if isinstance(settings.eval, str):
        source = open_source(settings.eval, settings.eval_split, "data.eval")
        found = shelf.columns(source)
        evaluation = whole_table([found], [1.0], [_ids(found, names, source.name)])
    elif settings.eval is not None:
        table, evaluation = hold_out(table, settings.eval, seed, [source.one_document for source in sources])
        held = [settings.eval, seed]
    identity = [[shelf.key(source), weight] for source, weight in zip(sources, weights)] + held
    return Prepared(table, evaluation, sum(c.left_out for c in columns), _digest(identity), names)


class _Shelf:
    """The cache: one folder a source, named by everything that its tokens depend on."""

    def __init__(self, settings: DataSettings, tokenizer: Any, folder: Path, show_progress: bool) -> None:
        self.settings, self.encoder, self.folder, self.show_progress = (
            settings,
            Encoder(tokenizer),
            folder,
            show_progress,
        )
        self.tokenizer_digest = tokenizer_digest(tokenizer)

    def key(self, source: Source) -> str:
        matters: dict[str, str | None] = {name: self.settings.column(name) for name in COLUMNS}
        matters |= {"format": self.settings.format, "template": self.settings.template}
        return _digest([LAYOUT, source.content, self.tokenizer_digest, matters, self.settings.max_length])

    def columns(self, source: Source) -> Columns:
        folder = self.folder / self.key(source)
        found = read_columns(folder)
        if found is None:
            facts = {"source": source.name, "content": source.content, "fingerprint": folder.name}
            facts |= {key: value for key, value in asdict(self.settings).items() if key in ("format", "max_length")}
            write_columns(folder, self._tokenised(source), facts)
            found = read_columns(folder)
        if found is None:
            raise UsageError(
                f"data.cache_dir is {str(self.folder)!r}; what was just written there cannot be read again"
            )
        return found

    def _tokenised(self, source: Source) -> Iterator[tuple[int, Sample | None]]:
        format_ = FORMATS[self.settings.format]
        rows = (Row(record, number, source.name, self.settings) for number, record in enumerate(source.read(), 1))
        with _progress(self.show_progress) as progress:
            task = progress.add_task(f"tokenising {Path(source.name).name}", total=None)
            for batch in _batches(rows):
                for row, samples in zip(batch, format_(batch, self.encoder)):
                    for sample in samples:
                        yield row.number, sample
                progress.advance(task, len(batch))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what decides on ids: the vocabulary with its rules, the marks, the chat template."""
    if hasattr(tokenizer, "sp_model"):
        body: Any = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
        added = added_beyond_pieces(tokenizer)
        body = [body, added] if added else body
    elif getattr(tokenizer, "backend_tokenizer", None) is not None:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by the last call that was made, not by the tokenizer's files.
        body = {key: value for key, value in body.items() if key not in ("truncation", "padding")}
    else:
        body = sorted(tokenizer.get_vocab().items())
    encoder = Encoder(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return _digest([body, encoder.opening, encoder.closing, encoder.end, template])


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def _ids(columns: Columns, names: list[str] | None, source: str) -> Any:
    return None if names is None else class_ids(columns, names, source)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _progress(shown: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)
