"""One breakage: a text of the product, what stands there instead, and the tests that must turn red."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A slip that a tired engineer could make in one place.

    `text` stands exactly once in `file` (a path from the repository's root) and may span lines; `promise` is what the
    product does no longer with `becomes` in its place; `tests` are pytest node ids, the fewest and quickest that notice.
    """

    name: str
    file: str
    text: str
    becomes: str
    promise: str
    tests: list[str]

    def applied_to(self, source: str) -> str:
        """`source` with the slip in it; ValueError where the text does not stand there exactly once."""
        times = source.count(self.text)
        if times != 1:
            raise ValueError(f"mutant {self.name}: its text stands {times} times in {self.file}; accepted: once")
        return source.replace(self.text, self.becomes)

    def written_into(self, root: Path) -> str:
        """Break the tree at `root`; returns the file's text as it was."""
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        path.write_text(self.applied_to(before), encoding="utf-8")
        return before
