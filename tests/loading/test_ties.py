"""Tied by configuration, untied in the file: transformers' rule, for every family and every part of a tie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import gathered
from tests.loading.untied import CASES, pairs, reference, save_untied
from tests.ranks import run_on_ranks
from tests.tiny_models import logits

SITUATIONS = [(case, target) for case in CASES for target in (*pairs(case), "all")]


@pytest.mark.parametrize(("case", "target"), SITUATIONS)
def test_two_tensors_with_different_values_stay_two(case: str, target: str, tmp_path: Path) -> None:
    tied = pairs(case)
    save_untied(tmp_path, case, tied if target == "all" else [target])
    expected = reference(tmp_path, case)
    model = dsub.load_frozen(tmp_path, storage="fp32", task=CASES[case][1])
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    for one, other in tied.items():
        ours, theirs = (m.get_parameter(one) is m.get_parameter(other) for m in (model, expected))
        assert ours == theirs, (one, other)
    model.tie_weights()  # what saving, resizing and the Trainer call
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "bert", "flan"])
def test_two_tensors_with_the_same_values_are_one_parameter(case: str, tmp_path: Path) -> None:
    save_untied(tmp_path, case, (), equal=pairs(case))
    model = dsub.load_frozen(tmp_path, storage="nf4", dtype="float32", task=CASES[case][1])
    for one, other in pairs(case).items():
        assert model.get_parameter(one) is model.get_parameter(other)
    assert model.config.tie_word_embeddings


def test_values_that_differ_less_than_the_models_type_shows_are_the_same(tmp_path: Path) -> None:
    save_untied(tmp_path, "llama", (), equal=pairs("llama"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] *= 1 + 2.0**-20
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for storage, one in (("bf16", True), ("fp32", False)):
        model = dsub.load_frozen(tmp_path, storage=storage)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == one


def test_the_configuration_says_what_is_tied(tmp_path: Path) -> None:
    for case, apart, left in (("llama", ["lm_head.weight"], False), ("bert", ["cls.predictions.decoder.bias"], True)):
        save_untied(tmp_path / case, case, apart)
        model = dsub.load_frozen(tmp_path / case, storage="fp32", task=CASES[case][1])
        assert model.config.tie_word_embeddings == left, case


def split(folder: str, case: str) -> tuple[bool, torch.Tensor]:
    stage3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    model = dsub.load_frozen(folder, storage="fp32", task=CASES[case][1], deepspeed=stage3)
    parameters = list(model.parameters())
    with gathered(parameters):
        return all(is_partitioned(p) for p in parameters), logits(model)


def test_on_split_weights_too(tmp_path: Path) -> None:
    save_untied(tmp_path, "flan", ["lm_head.weight"])
    expected = logits(reference(tmp_path, "flan"))
    for partitioned, rank in run_on_ranks(2, split, str(tmp_path), "flan"):
        assert partitioned
        torch.testing.assert_close(rank, expected, rtol=1e-4, atol=1e-4)
