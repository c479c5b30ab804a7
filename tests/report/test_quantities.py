"""Numbers as people read them: each kind of size, time and figure, at its edges."""

from __future__ import annotations

import math

import pytest

from dist_subspace.report.quantities import amount, bytes_text, clock_text, figures
from tests.step_records import step_record, unknown_record


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**50, "1,024.0 TiB"),
    ],
)
def test_bytes_are_counted_by_1024(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (59.6, "1:00"),
        (61.0, "1:01"),
        (3600.0, "1:00:00"),
        (2 * 86400 + 3 * 3600 + 4 * 60 + 5, "2 d 3:04:05"),
        (86400.0, "1 d 0:00:00"),
        (math.inf, "-:--"),
    ],
)
def test_a_time_says_its_days_and_hours_where_it_has_some(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (1.5, "1.5000"),
        (0.00012345, "1.234e-04"),
        (820.493, "820.4930"),
        (-12345.67, "-12,345.7"),
        (1.5e6, "1.500e+06"),
        (1234, "1,234"),
        (None, "-"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_figure_that_is_small_or_large_keeps_its_digits(value: float | int | None, text: str) -> None:
    assert amount(value) == text


def test_a_line_of_a_step_has_what_is_known_in_its_order() -> None:
    record = step_record(
        1,
        peak_memory_bytes=2048,
        tokens_per_second=1234.4,
        grad_norm=0.51234,
        learning_rate=2e-4,
        penalty=0.25,
        loss=2.0,
    )
    parts = ["loss 2.0000", "penalty 0.2500", "lr 2.00e-04", "grad norm 0.512", "1,234 tokens/s", "2.0 KiB"]
    assert figures(record) == parts
    assert figures(unknown_record(1)) == ["loss nan"]
