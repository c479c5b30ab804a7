"""Houlsby adapters: golden numbers, where they go in every family, and trained norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceLinear, attached, trainable_parameters
from dist_subspace.subspace.core.targets import Choice
from tests.subspace.golden import BIAS, BOTTLENECK, BOTTLENECK_GOLDEN, W, X, give, layer
from tests.tiny_models import BLOCK_OUTPUTS, FAMILIES, logits, tiny_model

BLOCKS = {"T5ForConditionalGeneration": 10}  # adapters: two in each encoder block, three in each decoder block


@pytest.mark.parametrize("activation", BOTTLENECK_GOLDEN)
def test_forward_is_the_golden_one(activation: str) -> None:
    for transposed in (False, True):
        module = layer("houlsby", rank=2, transposed=transposed, options={"activation": activation})
        torch.testing.assert_close(give(module, **BOTTLENECK)(X), torch.tensor([BOTTLENECK_GOLDEN[activation]]))


def test_the_frozen_bias_is_inside_what_the_adapter_sees() -> None:
    module = give(layer("houlsby", rank=2, bias=True, options={"activation": "relu"}), **BOTTLENECK)
    z = X @ W.t() + BIAS
    hidden = (z @ BOTTLENECK["adapter_down"].t() + BOTTLENECK["adapter_down_bias"]).relu()
    expected = z + hidden @ BOTTLENECK["adapter_up"].t() + BOTTLENECK["adapter_up_bias"]
    torch.testing.assert_close(module(X), expected)
    module.enabled = False
    torch.testing.assert_close(module(X), z)


def test_the_start_is_zero_above_kaiming_below() -> None:
    module = layer("houlsby", rank=3)
    assert not module.adapter_up.any() and not module.adapter_up_bias.any() and not module.adapter_down_bias.any()
    assert module.adapter_down.std() > 0.1 and module.adapter_down.abs().max() <= 3**-0.5


def test_it_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="method houlsby cannot be merged"):
        layer("houlsby", rank=2).merged(W)


def attach(model: Any, **config: Any) -> Any:
    return dsub.attach(model, SubspaceConfig("houlsby", **config))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_stand_behind_every_attention_and_every_ffn(name: str) -> None:
    chosen = attached(attach(tiny_model(name), rank=2)).layers
    ends = {next(end for end in sorted(BLOCK_OUTPUTS[name], key=len)[::-1] if layer.endswith(end)) for layer in chosen}
    assert ends == BLOCK_OUTPUTS[name] and len(chosen) == BLOCKS.get(name, 4)


def test_an_unset_bottleneck_is_cut_to_the_model_and_a_given_one_is_not(tmp_path: Any) -> None:
    model = attach(tiny_model())
    assert attached(model).settings.rank == 32
    assert {m.settings.rank for m in model.modules() if isinstance(m, SubspaceLinear)} == {32}
    dsub.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(dsub.load_adapter(tiny_model(), tmp_path)), logits(model))
    with pytest.raises(UsageError, match=r"subspace\.rank is 64, but .*o_proj is 32 x 32; accepted: at most 32"):
        attach(tiny_model(), rank=64)


def test_a_model_whose_layers_have_no_known_names_is_refused_with_some_of_them() -> None:
    with pytest.raises(UsageError, match=r"no layer of this model has a known name of an attention output; .*q_proj"):
        attach(tiny_model(), exclude_modules=["o_proj"])
    assert len(attached(attach(tiny_model(), rank=2, target_modules=["v_proj"])).layers) == 2


# Norms.


@pytest.mark.parametrize(("name", "norms", "values"), [("LlamaForCausalLM", 4, 32), ("GPT2LMHeadModel", 4, 64)])
def test_the_norms_of_the_blocks_train_too_where_asked(name: str, norms: int, values: int) -> None:
    few = sum(p.numel() for p in trainable_parameters(attach(tiny_model(name), rank=2)))
    model = tiny_model(name)
    before = logits(model)
    attach(model, rank=2, options={"train_norms": True})
    assert len(attached(model).layers) == 4 + norms
    assert sum(p.numel() for p in trainable_parameters(model)) == few + norms * values
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


def test_norms_of_queries_and_keys_are_left_alone() -> None:
    block = nn.ModuleDict({"q_norm": nn.LayerNorm(4), "input_norm": nn.LayerNorm(8)})
    stack = nn.ModuleDict({"layers": nn.ModuleList([block]), "norm": nn.LayerNorm(8)})
    assert list(Choice(stack, "all-linear", False, (), ()).block_norms()) == ["layers.0.input_norm"]
