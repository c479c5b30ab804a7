"""A file of answers that is written as they come, and gone on with after an end of any kind. Local: rank 0 alone.

Answers go, a line each, into OUTPUT.partial, which becomes OUTPUT when the last one is there; OUTPUT.partial.json, written before
it, says what was asked, so that nothing else is ever written behind it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import json_ready, storage_error, sync, write_json_atomic
from dist_subspace.errors import UsageError


class AnswerFile:
    """done: how many lines are there, whole."""

    def __init__(self, path: str | Path, asked: Mapping[str, Any]) -> None:
        """Begin the file, or find what there is of it.

        Arguments:
            asked: everything that the answers depend on, plain enough for JSON.

        Raises:
            UsageError: the file is there already, or was begun with another question. StorageError: the disk refuses.
        """
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.about = self.path.with_name(f"{self.path.name}.partial.json")
        check_new(self.path)
        try:
            if self.partial.exists():
                self._check(asked)
                self.done = self._cut_to_whole_lines()
            else:
                write_json_atomic(self.about, dict(asked))
                self.partial.touch()
                self.done = 0
        except OSError as error:
            raise storage_error(self.path, error) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Lines that are on disk when this returns. Raises StorageError."""
        lines = [json.dumps(json_ready(record), ensure_ascii=False, default=str) + "\n" for record in records]
        try:
            with self.partial.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error
        self.done += len(lines)

    def finish(self) -> None:
        """The file gets its name. Raises StorageError."""
        try:
            os.replace(self.partial, self.path)
            sync(self.path.parent)
            self.about.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _check(self, asked: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self.about.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.partial} is there, and {self.about.name}, which says what it answers, cannot be read; accepted: another "
                "--output, or without that file"
            ) from error
        now = json.loads(json.dumps(dict(asked)))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"{self.partial} was begun with {name} {before.get(name)!r}, and not {now.get(name)!r}; accepted: the same "
                    "command, another --output, or without that file"
                )

    def _cut_to_whole_lines(self) -> int:
        """How many there are; what a killed process has left of one more is cut off."""
        whole, lines = 0, 0
        with self.partial.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole, lines = whole + len(line), lines + 1
            file.truncate(whole)
        return lines


def check_new(path: str | Path) -> None:
    """Raises UsageError where the file is there, or cannot come to be."""
    if Path(path).exists():
        raise UsageError(f"--output is {str(path)!r}, which is there already; accepted: a new file")
    if not Path(path).parent.is_dir():
        raise UsageError(f"--output is {str(path)!r}, in a folder that is not there; accepted: a file in a folder")
