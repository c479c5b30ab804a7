"""Pairs of two lists as pytest's parameters: a sample of them by default, and all of them with the slow tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

ONE_OF = 3


def pairs(first: Sequence[Any], second: Sequence[Any], one_of: int = ONE_OF) -> list[Any]:
    """Every pair; slow but for those with the first of the first list, and one of `one_of` of the others, in which each value
    of either list occurs."""
    return [
        pytest.param(one, other, marks=[] if not row or (row + column) % one_of == 0 else [pytest.mark.slow])
        for (row, one), (column, other) in product(enumerate(first), enumerate(second))
    ]
