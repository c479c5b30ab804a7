"""The keys of the section `subspace`."""

from __future__ import annotations

from tests.keys.table import Key

KEYS: list[Key] = []
