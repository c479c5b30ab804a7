"""Records (one dictionary a sample) from files and from the Hub. Every fault of a file is one sentence that names it.

Read against datasets 5.2: what tells one state of a Hub data set from another is its `_fingerprint`.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_subspace.errors import UsageError
from dist_subspace.training.data.json_text import read_json, read_json_lines
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.tables import read_csv, read_parquet
from dist_subspace.training.data.values import cleaned

Record = dict[str, Any]
EVAL = "data.eval"
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
HUB_TIMEOUT = 5.0  # seconds; `datasets` alone would retry for half a minute before it says that nobody is there


@dataclass(frozen=True)
class Source:
    """A file, or a split of a Hub data set, whose records can be read any number of times."""

    name: str
    content: str
    """sha256 of the file's bytes, or the Hub data set's own fingerprint: equal content, equal string."""
    read: Callable[[], Iterator[Record]]
    one_document: bool = False
    """A plain text file: one record, and its pieces are its samples."""
    field: str = "data.train"
    """The key of the configuration that names it."""

    @property
    def facts(self) -> Facts:
        return Facts(self.name, self.content, self.one_document, self.field)


class Facts(NamedTuple):
    """What is known of a source whose records another rank reads: the fields of `Source` but `read`."""

    name: str
    content: str
    one_document: bool
    field: str

    def tokenised(self) -> Source:
        """The source for whoever only looks for its tokens."""
        return Source(self.name, self.content, self._unread, self.one_document, self.field)

    def _unread(self) -> Iterator[Record]:
        raise UsageError(
            f"{self.field} is {self.name!r}, whose tokens were just made, and this rank on {socket.gethostname()} does not find "
            "them; accepted: a data.cache_dir or run.local_dir that all ranks of a node see"
        )


def open_source(path: str, split: str, field: str = "data.train") -> Source:
    """The source that `path` names: a file of a known kind, else a Hub data set.

    Raises:
        UsageError: no such file, empty, of a kind not known, or a Hub data set that cannot be had.
    """
    file = Path(path).expanduser()
    kind = file.suffix.lower()
    if file.is_dir():
        raise UsageError(f"{field} is {path!r}, a folder; accepted: a file ({', '.join(READERS)}) or a Hub data set")
    if file.is_file():
        if kind not in READERS:
            raise UsageError(f"{field} is {path!r}, of an unknown kind; accepted: {', '.join(READERS)}")
        if file.stat().st_size == 0:
            raise UsageError(f"{field} is {path!r}, an empty file")
        return Source(path, _sha256(file), lambda: _checked(READERS[kind], file), kind == ".txt", field)
    if kind in READERS or not HUB_NAME.match(path):
        raise UsageError(f"{field} is {path!r}; there is no such file")
    return _hub(path, split, field)


def open_sources(settings: DataSettings) -> list[Source]:
    """The sources that are trained on, and the one that is evaluated on, if it is another.

    Raises:
        UsageError: as `open_source`.
    """
    sources = [open_source(path, settings.split) for path, _ in settings.sources()]
    if isinstance(settings.eval, str):
        sources.append(open_source(settings.eval, settings.eval_split, EVAL))
    return sources


def _checked(reader: Callable[[Path], Iterator[Record]], file: Path) -> Iterator[Record]:
    try:
        yield from cleaned(reader(file), str(file))
    except UnicodeDecodeError as error:
        raise UsageError(_not_utf8(file)) from error
    except RecursionError as error:
        raise UsageError(f"{file} is nested too deeply; accepted: records of text") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error


def _not_utf8(file: Path) -> str:
    """A sentence on the file's first byte that is not UTF-8 (a decoder counts from wherever it was given text)."""
    bytes_before = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return f"{file} is UTF-16 text; accepted: UTF-8"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place, byte = bytes_before + error.start, line[error.start]
                return f"{file} is not UTF-8 text: byte 0x{byte:02x} at offset {place:,}, in line {number:,}"
            bytes_before += len(line)
    return f"{file} is not UTF-8 text"


def _read_text(file: Path) -> Iterator[Record]:
    """The whole file is one document (line ends become "\\n")."""
    yield {"text": file.read_text("utf-8-sig")}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": _read_text,
}


def _hub(name: str, split: str, field: str) -> Source:
    from dist_subspace.loading.hub import asked  # brings torch, which no worker needs

    rows = asked(lambda: _load(name, split, field), name, field)
    return Source(
        name, f"{name}:{split}:{rows._fingerprint}", lambda: cleaned((dict(row) for row in rows), name), field=field
    )


def _load(name: str, split: str, field: str) -> Any:
    """Raises UsageError for what no other try mends; else whatever the Hub's client raises."""
    import datasets

    if not _needs_no_hub(name):
        _ask_hub(name)
    try:
        return datasets.load_dataset(name, split=split)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{field} is {name!r}, a Hub data set without a split {split!r} ({reason})") from error


def _needs_no_hub(name: str) -> bool:
    """Whether `datasets` holds it in its own cache, or is told to stay offline (and then fails at once by itself)."""
    import datasets

    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or datasets.config.HF_HUB_OFFLINE
    return offline or (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _ask_hub(name: str) -> None:
    from huggingface_hub import HfApi

    HfApi().dataset_info(name, timeout=HUB_TIMEOUT)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
