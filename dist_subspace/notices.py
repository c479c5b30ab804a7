"""Sentences for the user that no return value carries: what stayed dense, what a default left out.

In a run they go to its screen (`heard`), from whichever part of the package they come; elsewhere they are Python warnings
(`Notice`), which the command line shows as sentences. With several ranks, rank 0 alone speaks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dist_subspace.errors import Notice

_listeners: list[Callable[[str], None]] = []


def say(sentence: str) -> None:
    """Tell the user, once: the innermost listener, or by a warning."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    if _listeners:
        _listeners[-1](sentence)
    else:
        warnings.warn(sentence, Notice, stacklevel=3)


@contextmanager
def heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block the sentences are the listener's."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def named(names: list[str], shown: int = 4) -> str:
    """Layers for a sentence: one name of each kind (a layer's number apart), and how many there are."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    words = [alike[0] if len(alike) == 1 else f"{alike[0]} and {len(alike) - 1} like it" for alike in kinds.values()]
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} other kinds" if len(words) > shown else "")
