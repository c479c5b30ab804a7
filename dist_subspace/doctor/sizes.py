"""Bytes in words."""

from __future__ import annotations


def size(value: int) -> str:
    """With the unit that a person would take, and about three digits."""
    units = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
    number, unit = next(((value / least, unit) for least, unit in units if value >= least), (value / 1024, "KiB"))
    return f"{number:,.0f} {unit}" if number >= 10 or number == int(number) else f"{number:.1f} {unit}"
