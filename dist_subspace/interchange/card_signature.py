"""Whether a card is as this package wrote it, or a person has edited it since: then it is the person's, and stays. Local.

The last line of a card is a comment, which no reader shows, with the hash of everything above it.
"""

from __future__ import annotations

import hashlib
import re

_LINE = re.compile(r"<!-- written by dist_subspace, ([0-9a-f]{16}) -->\n*\Z")


def signed(card: str) -> str:
    """The card with its last line, in the place of an older one."""
    text = _LINE.sub("", card).rstrip("\n") + "\n"
    return f"{text}\n<!-- written by dist_subspace, {_hash(text)} -->\n"


def is_unedited(card: str) -> bool:
    """Whether every character is as `signed` left it. A card without the line is somebody's own."""
    card = card.replace("\r\n", "\n")
    line = _LINE.search(card)
    return line is not None and line[1] == _hash(card[: line.start()].rstrip("\n") + "\n")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
