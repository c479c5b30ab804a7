"""What the losses of a run say about its end."""

from __future__ import annotations

import math

import pytest

from dist_subspace.training.outcome import divergence, failure, losses_by_step, skipped_text
from tests.step_records import unknown_record

NAN, INF = math.nan, math.inf


def test_a_tenth_is_compared_with_a_tenth() -> None:
    assert divergence([2.0] * 10 + [9.0] * 80 + [3.0] * 10) is None  # exactly half above
    said = divergence([2.0] * 10 + [1.0] * 80 + [3.1] * 10)
    assert said is not None and "last 10 steps is 3.1, of its first 2;" in said
    assert divergence([1.0, 1.6]) is not None and divergence([1.0]) is None and divergence([]) is None


def test_losses_that_are_no_numbers_are_left_out_of_the_means() -> None:
    assert divergence([1.0] * 18 + [2.0, NAN]) is not None and "finite" in str(divergence([1.0] * 18 + [NAN, INF]))
    assert divergence([NAN] * 10 + [5.0] * 90) is None
    assert divergence([NAN, 1.0, *[9.0] * 16, NAN, 1.4]) is None


def test_lines_from_before_a_resume_count_for_the_steps_that_they_are_the_mean_of() -> None:
    lines = [unknown_record(1, loss=4.0), unknown_record(3), unknown_record(5, loss=2.0)]
    found = losses_by_step(lines, [1.0, 0.5], 3)
    assert found[0] == 4.0 and found[3:] == [1.0, 0.5] and len(found) == 5 and all(map(math.isnan, found[1:3]))
    assert losses_by_step([], [1.0], 7) == [1.0]


@pytest.mark.parametrize(
    ("skipped", "steps", "last", "words"),
    [
        (6, 6, None, "6 of 6 steps were skipped"),
        (1, 1, 2.0, "1 of 1 steps were skipped"),
        (4, 6, NAN, "loss is nan (4 of 6 steps were skipped"),
        (0, 2, INF, "loss is inf; no adapter is written"),
    ],
)
def test_a_run_without_a_usable_end_fails(skipped: int, steps: int, last: float | None, words: str) -> None:
    assert words in str(failure(skipped, steps, last))


def test_a_run_with_a_usable_end_does_not() -> None:
    assert failure(5, 6, 2.0) is None and failure(5, 6, None) is None and failure(0, 0, None) is None
    assert skipped_text(0, 6) is None and str(skipped_text(5, 6)).startswith("5 of 6 steps were skipped")
