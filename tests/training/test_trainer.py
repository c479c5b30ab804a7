"""What a step counts and says, against what the model was given."""

from __future__ import annotations

from itertools import accumulate

import pytest

from tests.keys.bench import RECORDS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("runs"))


def test_a_line_counts_the_samples_and_tokens_that_the_model_was_given(bench: Bench) -> None:
    outcome = bench.usual()
    rows = outcome.trained_on
    tokens = list(accumulate(sum(map(len, rows[start : start + 4])) for start in range(0, len(rows), 4)))
    lines = outcome.steps
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [line["tokens"] for line in lines] == tokens
    assert [line["epoch"] for line in lines] == pytest.approx([4 * step / RECORDS for step in range(1, 7)])
    seconds = [line["elapsed_seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 2**20 for line in lines)
