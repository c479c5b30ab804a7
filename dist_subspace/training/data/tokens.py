"""From the configuration's data section to tables of tokens: tokenised once, then memory-mapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.cutting import Cutting, counted
from dist_subspace.training.data.fingerprint import digest, tokenizer_digest
from dist_subspace.training.data.labels import class_ids, label_names
from dist_subspace.training.data.pieces import Pieces
from dist_subspace.training.data.settings import (
    COLUMNS,
    PREFERENCE_COLUMNS,
    TEMPLATE_COLUMNS,
    DataSettings,
    prompted_as,
)
from dist_subspace.training.data.sources import EVAL, Source, open_source, open_sources
from dist_subspace.training.data.store import Columns, read_columns, write_columns
from dist_subspace.training.data.table import TokenTable, hold_out, whole_table
from dist_subspace.training.data.template import give_chat_template, said_of_default
from dist_subspace.training.data.tokenising import Tokenising

LAYOUT = 3  # of the stored columns and of how text becomes tokens; a change makes old caches unread
IDENTITY = 1  # of the data's fingerprint, which stored runs hold


@dataclass(frozen=True)
class Prepared:
    """What a run trains and evaluates on."""

    train: TokenTable
    eval: TokenTable | None
    cutting: Cutting
    """What became of samples longer than `max_length`."""
    fingerprint: str
    """Equal for equal training data, tokens and held-out part; says nothing of paths."""
    labels: list[str] | None
    """Class names by id (classification)."""
    notices: list[str]
    """Sentences about the data that the run has to say."""

    @property
    def left_out(self) -> int:
        """Training samples whose answer alone did not fit into `max_length`."""
        return self.cutting.left_out


def prepare(
    settings: DataSettings,
    tokenizer: Any,
    cache_dir: str | Path,
    seed: int,
    show_progress: bool,
    task: str,
    poll: Callable[[], None] = lambda: None,
    sources: Sequence[Source] | None = None,
) -> Prepared:
    """Read, tokenise (or find tokenised in `cache_dir`) and divide the data of a run. Local: no collective.

    A second call with the same files, tokenizer and settings only maps what the first stored. `poll` is called every few
    hundred records and may raise to stop; what is tokenised by then is kept for the next call.

    Arguments:
        sources: what `open_sources` gives, where that is known already.

    Raises:
        UsageError: anything wrong with a file, a record, or the settings.
    """
    _check_task(settings, task)
    if prompted_as(settings.format) == "chat":
        give_chat_template(tokenizer)
    shelf = _Shelf(settings, tokenizer, Path(cache_dir), show_progress, poll)
    sources = open_sources(settings) if sources is None else sources
    evaluated = [source for source in sources if source.field == EVAL]
    sources = [source for source in sources if source.field != EVAL]
    weights = [weight for _, weight in settings.sources()]
    columns = [shelf.columns(source) for source in sources]
    names = label_names(columns) if task == "classification" else None
    table = whole_table(columns, weights, [_class_ids(c, names, s.name) for c, s in zip(columns, sources)])
    evaluation: TokenTable | None = None
    held_out: list[Any] = []
    if evaluated:
        (source,) = evaluated
        eval_columns = shelf.columns(source)
        evaluation = whole_table([eval_columns], [1.0], [_class_ids(eval_columns, names, source.name)])
    elif settings.eval is not None and not isinstance(settings.eval, str):
        table, evaluation = hold_out(table, settings.eval, seed, [source.one_document for source in sources])
        held_out = [settings.eval, seed]
    identity = [[shelf.identity(source), weight] for source, weight in zip(sources, weights)] + held_out
    cutting = counted([c.seen for c in columns], [c.dropped for c in columns], [len(c) for c in columns])
    return Prepared(table, evaluation, cutting, digest(identity), names, _notices(columns, tokenizer, settings))


@dataclass(frozen=True)
class Evaluated:
    """Samples that are evaluated alone: those of `data.eval`, where that is data of its own."""

    table: TokenTable
    fingerprint: str
    """Equal for equal samples."""
    cutting: Cutting
    notices: list[str]


def prepare_evaluation(
    settings: DataSettings,
    tokenizer: Any,
    cache_dir: str | Path,
    show_progress: bool,
    task: str,
    labels: list[str] | None,
) -> Evaluated:
    """Read and tokenise `data.eval`, data of its own, alone; the training data is not looked at. Local: no collective.

    Arguments:
        labels: the class names by id, as training had them.

    Raises:
        UsageError: anything wrong with the file, a record, or the settings; a label that training never saw.
    """
    _check_task(settings, task)
    if prompted_as(settings.format) == "chat":
        give_chat_template(tokenizer)
    source = open_source(str(settings.eval), settings.eval_split, EVAL)
    shelf = _Shelf(settings, tokenizer, Path(cache_dir), show_progress, lambda: None)
    columns = shelf.columns(source)
    table = whole_table([columns], [1.0], [_class_ids(columns, labels, source.name)])
    cutting = counted([columns.seen], [columns.dropped], [len(columns)])
    identity = digest([shelf.identity(source), labels])
    return Evaluated(table, identity, cutting, _notices([columns], tokenizer, settings))


def _check_task(settings: DataSettings, task: str) -> None:
    if (task == "classification") != (settings.format == "classification"):
        raise UsageError(
            f"data.format is {settings.format!r} with model.task {task!r}; classification goes with classification only"
        )


def _notices(columns: list[Columns], tokenizer: Any, settings: DataSettings) -> list[str]:
    counts: Counter[str] = Counter()
    for source_columns in columns:
        counts.update(source_columns.remarks)
    sentences = said_of_default(tokenizer) if prompted_as(settings.format) == "chat" else []
    return sentences + [remark.replace("{count}", f"{count:,}") for remark, count in sorted(counts.items())]


class _Shelf:
    """The cache: one folder a source, named by everything that its tokens depend on."""

    def __init__(
        self, settings: DataSettings, tokenizer: Any, folder: Path, show_progress: bool, poll: Callable[[], None]
    ) -> None:
        self.settings, self.tokenizer, self.folder = settings, tokenizer, folder
        self.show_progress, self.poll = show_progress, poll
        self.tokenizer_digest = tokenizer_digest(tokenizer)

    def identity(self, source: Source) -> str:
        """The digest is equal for equal tokens; it leaves out what is at its default, so that stored runs are known again."""
        decisive: dict[str, str | None] = {name: self.settings.column(name) for name in COLUMNS}
        decisive |= {"format": self.settings.format, "template": self.settings.template}
        optional = (*TEMPLATE_COLUMNS, *PREFERENCE_COLUMNS)
        renamed = {name: self.settings.column(name) for name in optional if self.settings.column(name) != name}
        if self.settings.truncation != DataSettings.truncation:
            renamed["truncation"] = self.settings.truncation
        return digest([IDENTITY, source.content, self.tokenizer_digest, decisive | renamed, self.settings.max_length])

    def columns(self, source: Source) -> Columns:
        key = digest([LAYOUT, self.identity(source)])
        folder = self.folder / key
        columns = read_columns(folder)
        if columns is None:
            self._write(source, folder)
            columns = read_columns(folder)
        if columns is None:
            raise UsageError(
                f"data.cache_dir is {str(self.folder)!r}; what was just written there cannot be read again"
            )
        return columns

    def _write(self, source: Source, folder: Path) -> None:
        facts = {"source": source.name, "content": source.content, "fingerprint": folder.name}
        facts |= {key: value for key, value in asdict(self.settings).items() if key in ("format", "max_length")}
        pieces = Pieces(self.folder, folder.name)
        try:
            with _progress(self.show_progress) as progress:
                task = progress.add_task(f"tokenising {Path(source.name).name}", total=None)
                job = Tokenising(
                    source, self.settings, self.tokenizer, self.tokenizer_digest, pieces, self.poll,
                    lambda records: progress.advance(task, records),
                )  # fmt: skip
                count = job.run()
            write_columns(folder, pieces.all(count), facts)
        except OSError as error:
            if read_columns(folder) is not None:
                return  # another process has tokenised the same meanwhile, and taken the pieces away
            raise UsageError(
                f"data.cache_dir is {str(self.folder)!r}, which cannot be written: {error.strerror or error}"
            ) from error
        pieces.remove()


def _class_ids(columns: Columns, names: list[str] | None, source: str) -> Any:
    return None if names is None else class_ids(columns, names, source)


def _progress(shown: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
