"""Bytes in words."""

from __future__ import annotations


def size(value: int) -> str:
    """With the unit that a person would take."""
    return f"{value / 2**30:.1f} GiB" if value >= 1 << 30 else f"{value / 2**20:.1f} MiB"
