"""A type that nobody gave: what the processors multiply fast, the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.loading import computation_type
from dist_subspace.loading.computation_type import unset_type
from dist_subspace.placement.collectives import world
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, tiny_model

CPU = torch.device("cpu")


def slow_on(rank: int) -> str:
    """Collective: the type, where torch says of one rank's processor that it has no 16-bit products."""
    told = computation_type.cpu_multiplies
    computation_type.cpu_multiplies = lambda dtype: world().rank != rank  # type: ignore[assignment]
    try:
        return str(unset_type("nf4", CPU, together=True))
    finally:
        computation_type.cpu_multiplies = told


def test_a_packed_model_computes_in_float32_where_16_bits_are_slow_and_others_as_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(computation_type, "cpu_multiplies", lambda dtype: False)
    assert logits(dsub.load_frozen(tmp_path, "nf4")).dtype == torch.float32
    assert logits(dsub.load_frozen(tmp_path, "nf4", dtype="bfloat16")).dtype == torch.bfloat16
    assert logits(dsub.load_frozen(tmp_path, "bf16")).dtype == torch.bfloat16
    assert unset_type("nf4", torch.device("cuda"), together=False) == torch.bfloat16


def test_one_rank_that_is_slow_decides_for_all() -> None:
    assert run_on_ranks(2, slow_on, 1) == ["torch.float32"] * 2
    assert run_on_ranks(2, slow_on, 5) == ["torch.bfloat16"] * 2
