"""Which samples share a row: first fit over a few open rows, as a function of the lengths in their order."""

from __future__ import annotations

from collections.abc import Sequence

OPEN_ROWS = 32
"""Rows that still take samples. More fills rows better, but moves samples further from their place in the order."""


def pack(lengths: Sequence[int], max_length: int, open_rows: int = OPEN_ROWS) -> list[list[int]]:
    """Rows of positions in `lengths`, each of at most `max_length` tokens, every position in exactly one row.

    A sample goes into the oldest open row that has room for it; where none has, a row is opened and, if there are
    too many, the oldest one closed. Rows come in the order in which they were opened.
    """
    rows: list[list[int]] = []
    window: list[tuple[int, list[int]]] = []  # (room left, row), oldest first
    for position, length in enumerate(lengths):
        for slot, (room, row) in enumerate(window):
            if length <= room:
                row.append(position)
                window[slot] = (room - length, row)
                break
        else:
            rows.append([position])
            window.append((max_length - length, rows[-1]))
            if len(window) > open_rows:
                window.pop(0)
    return rows
