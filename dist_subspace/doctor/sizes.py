"""Bytes in words."""

from __future__ import annotations


def size(value: int) -> str:
    """With the unit that a person would take, and about three digits."""
    number, unit = (value / 2**30, "GiB") if value >= 1 << 30 else (value / 2**20, "MiB")
    return f"{number:,.0f} {unit}" if number >= 10 or number == int(number) else f"{number:.1f} {unit}"
