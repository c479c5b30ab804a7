"""What packing gains and how lengths spread, against counting by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_subspace.training.data_report import histogram, packing_text


class Table:
    """Samples of these lengths, each once an epoch."""

    def __init__(self, lengths: list[int], seen: list[int] | None = None) -> None:
        self.lengths, self.shares = np.asarray(lengths), [(len(lengths), 1.0)]
        columns: Any = type("Columns", (), {"seen": np.asarray(seen or lengths)})
        self.parts = [type("Part", (), {"columns": columns})]


def test_packing_halves_the_rows_of_samples_that_fill_half_a_row() -> None:
    table: Any = Table([50] * 8)
    on = packing_text(table, max_length=100, packing=True, micro_batch=1, seed=0)
    assert on == (
        "on: 4 rows of 100, 100.0% of them tokens; off: 8 rows, 100.0% of them tokens: 2.0 times fewer forward calls in an epoch"
    )
    off = packing_text(table, max_length=100, packing=False, micro_batch=4, seed=0)
    assert off.startswith("off: 8 rows, 100.0%") and off.endswith("2.0 times fewer forward calls in an epoch")


def test_rows_of_a_call_are_padded_to_the_longest_of_them() -> None:
    table: Any = Table([10, 90])
    assert "off: 2 rows, 55.6% of them tokens" in packing_text(table, 100, False, micro_batch=2, seed=0)
    assert "off: 2 rows, 100.0% of them tokens" in packing_text(table, 100, False, micro_batch=1, seed=0)


def test_every_sample_stands_in_the_bar_of_its_length() -> None:
    rng = np.random.default_rng(0)
    seen = [*rng.integers(1, 500, 300).tolist(), 0, 0]  # 0: without a target
    data: Any = type("Data", (), {"train": Table(seen, seen)})
    lines = histogram(data, 200)
    found = 0
    for line in lines:
        low, high = (int(part.replace(",", "")) for part in line[:16].split("-"))
        count = int(line[16:].replace("#", "").split()[0].replace(",", ""))
        assert count == sum(low <= length <= high for length in seen)
        assert line.endswith("longer than data.max_length") == (low > 200)
        found += count
    assert found == 300 and len(lines) in (10, 11)
