"""What is trained of a norm: the family of the norm's own weight and bias, and a module that still looks like the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.subspace import trainable_parameters
from dist_subspace.subspace.blocks.norm_part import norm_width
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.subspace.extension.houlsby import HoulsbyNorm
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_inputs, tiny_model


def norm_part(shifted: bool = True) -> HoulsbyNorm:
    norm = nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return HoulsbyNorm(norm.requires_grad_(False), Settings(), 6, scaled=True, shifted=shifted)


def test_at_the_start_it_is_exactly_the_norm() -> None:
    part = norm_part()
    for dtype in (torch.float32, torch.bfloat16):
        part.base.to(dtype)
        x = torch.randn(4, 6, dtype=dtype)
        assert torch.equal(part(x), part.base(x)) and part(x).dtype == dtype


def test_trained_it_is_the_norm_with_the_merged_weight_and_bias() -> None:
    for shifted in (True, False):
        part = norm_part(shifted)
        for parameter in part.trainables().values():
            parameter.data.normal_()
        weight, bias = part.merged(part.base.weight), part.merged_bias(part.base.bias)
        x, g = torch.randn(4, 6), torch.randn(4, 6)
        expected = nn.functional.layer_norm(x, (6,), weight, bias, 1e-3)
        torch.testing.assert_close(part(x), expected)
        names, parameters = zip(*part.trainables().items(), strict=True)
        assert names == ("norm_scale", "norm_shift")[: 1 + shifted]
        actual = torch.autograd.grad(part(x), parameters, g)
        for one, other in zip(actual, torch.autograd.grad(expected, parameters, g), strict=True):
            torch.testing.assert_close(one, other)
        part.enabled = False
        assert torch.equal(part(x), part.base(x))


def test_models_may_read_the_norms_own_attributes() -> None:
    part = norm_part()
    assert part.weight is part.base.weight and part.eps == 1e-3 and part.normalized_shape == (6,)
    with pytest.raises(AttributeError, match="variance_epsilon"):
        _ = part.variance_epsilon
    assert set(part.trainables()) == {"norm_scale", "norm_shift"}
    assert set(dict(part.named_parameters())) == {"norm_scale", "norm_shift", "base.weight", "base.bias"}


def test_a_width_is_the_norms_word_or_its_weights() -> None:
    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

    assert norm_width(nn.LayerNorm(6)) == 6 and norm_width(nn.GroupNorm(2, 4)) == 4 and norm_width(RMSNorm(5)) == 5
    with pytest.raises(UsageError, match=r"the width of a RMSNorm is not known while its weight is split"):
        norm_width(RMSNorm(0))  # split over ranks, a weight shows no elements


# Under ZeRO-3, where norms are split too; a Pfeiffer adapter calls its norm twice.


def attached(folder: str, method: str, config: dict[str, Any], deepspeed: dict[str, Any] | None = None) -> Any:
    """The saved model with a method on it; with `deepspeed` its weights are split before the method comes."""
    model = dsub.load_frozen(folder, task=TASKS[Path(folder).name], storage="fp32", deepspeed=deepspeed, device="cpu")
    return dsub.attach(model, SubspaceConfig(method, rank=2, **config)).train()


def losses(folder: str, method: str, config: dict[str, Any]) -> list[float]:
    """Three steps on one process, without DeepSpeed."""
    model = attached(folder, method, config)
    optimizer = tiny.adam(trainable_parameters(model), lr=tiny.RATE)
    found = []
    for _ in range(3):
        loss = model(**tiny_inputs(model, labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def split_losses(folder: str, method: str, config: dict[str, Any], early: bool) -> list[float]:
    """The same three steps by DeepSpeed, at stage 3, with the same rows on every rank. Weights are split before the method
    comes (early), or by DeepSpeed itself afterwards."""
    size = world().size
    model = attached(folder, method, config, tiny.ds_config(3, world_size=size) if early else None)
    trained = sum(p.numel() for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=trained, world_size=size))
    assert all(is_partitioned(p) for p in model.parameters() if not p.requires_grad)
    found = []
    for _ in range(3):
        loss = engine(**tiny_inputs(model, labels=True)).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    engine.destroy()
    return found


TASKS = {"LlamaForCausalLM": "causal-lm", "GPT2LMHeadModel": "causal-lm", "BertForMaskedLM": "masked-lm"}
NORMS: dict[str, Any] = {"options": {"train_norms": True}}
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("LlamaForCausalLM", "houlsby", NORMS, True),  # whose norms do not tell their width while they are split
    ("LlamaForCausalLM", "houlsby", NORMS | {"target_modules": ["up_proj"]}, True),  # an output wider than the model
    ("BertForMaskedLM", "houlsby", NORMS, True),
    ("BertForMaskedLM", "pfeiffer", {}, True),
    ("BertForMaskedLM", "pfeiffer", {}, False),
    ("GPT2LMHeadModel", "bitfit", {}, True),
]


@pytest.mark.parametrize(("name", "method", "config", "early"), CASES)
def test_parts_on_norms_train_alike_where_norms_are_split(
    name: str, method: str, config: dict[str, Any], early: bool, tmp_path: Path
) -> None:
    folder = str(tmp_path / name)
    tiny_model(name).save_pretrained(folder)
    expected = losses(folder, method, config)
    assert expected[2] < expected[0]
    for found in run_on_ranks(2, split_losses, folder, method, config, early):
        assert found == pytest.approx(expected, rel=2e-5)
