"""The keys of the section `data`."""

from __future__ import annotations

from tests.keys.table import Key

KEYS: list[Key] = []
