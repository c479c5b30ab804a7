"""The recipes of configs/, and the lines that each begins with."""

from __future__ import annotations

import itertools
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "configs"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("quickstart"))


def header(path: Path) -> dict[str, str]:
    """The lines `# Name: words` of the comment that a recipe begins with, by name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    return dict(line.split(": ", 1) for line in comments if ": " in line)
