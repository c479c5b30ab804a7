"""Families of transformers against transformers: what they compute is computed, or refused in one true sentence."""

from __future__ import annotations

import os

import pytest

from tests.families.cases import all_cases, chosen
from tests.families.runner import TIMEOUT, check, run
from tests.families.table import FAR, row_of, table

# One of each kind of difficulty.
HANDFUL = {
    "causal-lm/llama": "the plain case",
    "causal-lm/gpt2": "Conv1D",
    "classification/canine": "no table of embeddings",
    "masked-lm/perceiver": "input embeddings that are no module",
    "causal-lm/reformer": "reversible blocks",
    "causal-lm/zamba": "blocks that share their weights by configuration",
    "masked-lm/luke": "a head tied to another table than the tokens', and layers for entities",
    "causal-lm/bart": "a decoder that stands alone",
    "causal-lm/mixtral": "experts that transformers joins when it loads",
    "causal-lm/mamba": "layers whose weight is read instead of called",
    "causal-lm/falcon": "a linear layer of the family's own class",
    "causal-lm/olmo+clip": "outputs that are changed in place",
    "masked-lm/squeezebert": "blocks of convolutions",
}


@pytest.mark.parametrize("name", HANDFUL)
def test_a_family_computes_trains_and_merges_as_transformers_does(name: str) -> None:
    (case,) = chosen([name])
    result = check(case)
    assert result.verdict == "right", f"{name} ({HANDFUL[name]}): {result.text}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_family_is_wrong() -> None:
    results = run(all_cases(), workers=min(2, os.cpu_count() or 1))
    wrong = [f"{result.name}: {result.text}" for result in results if result.verdict == "wrong"]
    counted = [result for result in results if result.verdict in ("right", "refused")]
    assert not wrong, "\n".join(wrong)
    assert len(counted) >= 400


# A family with experts, and one whose layers the model reads.
SAMPLE = ("causal-lm/mixtral", "causal-lm/mamba")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_of_the_table_holds_every_storage_and_two_ranks(name: str) -> None:
    (case,) = chosen([name])
    row = row_of(case, TIMEOUT)
    assert row.result.verdict == "right", row.result.text
    assert row.cells[1] == "equal" and "-" not in row.cells
    assert row.share is not None and 0.5 <= row.share < 0.55
    assert row.far is not None and row.far <= FAR
    assert bool(row.result.dense) == (name == "causal-lm/mamba"), "what stays dense is said"


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_no_row_of_the_table_is_wrong() -> None:
    rows = table([case for case in all_cases() if not case.changes], TIMEOUT, lambda row: None)
    wrong = [f"{row.result.name}: {row.result.text}" for row in rows if row.result.verdict == "wrong"]
    assert not wrong, "\n".join(wrong)
