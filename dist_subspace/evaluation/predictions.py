"""A file with a line for each result, which an evaluation that was interrupted goes on behind. Local: rank 0 alone.

`FILE` is JSON lines in the order of the data; `FILE.about.json` beside it says what they are results of. Lines come in blocks of
as many samples as are measured together; of a block that was cut, no line counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import storage_error, write_json_atomic
from dist_subspace.errors import UsageError

Line = dict[str, Any]


class Predictions:
    """The file, open for lines. `of`: what they are results of, as a mapping that JSON can hold."""

    def __init__(self, path: str | Path, of: Mapping[str, Any]) -> None:
        """Raises UsageError for a file of another evaluation, or one that cannot be written to."""
        self.path, self.about = Path(path), Path(f"{path}.about.json")
        known = json.loads(json.dumps(of))
        if self.path.exists():
            _check_same(self.path, self.about, known)
            self.lines = _whole_lines(self.path)
        else:
            self.lines = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.about, known)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--predictions is {str(path)!r}, which cannot be written: {error.strerror or error}"
            ) from error

    def keep(self, count: int) -> None:
        """Cut the file behind its first `count` lines."""
        self.lines = self.lines[:count]
        size = sum(len(_text(line).encode()) for line in self.lines)
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def write(self, lines: Sequence[Line]) -> None:
        """A block of lines, on disk when this returns.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            self._file.write("".join(map(_text, lines)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error
        self.lines += lines

    def close(self) -> None:
        self._file.close()


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _check_same(path: Path, about: Path, of: Mapping[str, Any]) -> None:
    try:
        before = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise UsageError(
            f"--predictions is {str(path)!r}, which is there already, without {about.name}; accepted: a new file"
        )
    other = [key for key in of if before.get(key) != of[key]]
    if other:
        raise UsageError(
            f"--predictions is {str(path)!r}, which holds results of another evaluation ({other[0]} was "
            f"{str(before.get(other[0]))[:60]!r}, and is {str(of[other[0]])[:60]!r}); accepted: a new file"
        )


def _whole_lines(path: Path) -> list[Line]:
    """The lines up to the first that is cut, or is none of ours."""
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict) or _text(line).encode() != raw + b"\n":
            break
        lines.append(line)
    return lines
