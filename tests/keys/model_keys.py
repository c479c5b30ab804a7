"""The keys of the section `model`."""

from __future__ import annotations

from tests.keys.table import Key

KEYS: list[Key] = []
