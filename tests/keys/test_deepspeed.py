"""The keys of the section `deepspeed`."""

from __future__ import annotations

import pytest

from tests.keys.bench import Bench
from tests.keys.table import Key, rows


@pytest.mark.parametrize("key", rows("deepspeed"), ids=str)
def test_a_key_changes_the_run_as_the_reference_says(key: Key, bench: Bench) -> None:
    key.check(bench)
