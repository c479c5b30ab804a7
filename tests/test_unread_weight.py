"""A weight that is shown instead of one that is not there: questions are answered, values are refused in every form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_subspace import SubspaceConfig, attach
from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.unread_weight import unread_weight
from tests.tiny_models import tiny_model

QUESTIONS: list[Callable[[Tensor], Any]] = [
    *(lambda w: w.dtype, lambda w: w.device, lambda w: w.shape, lambda w: w.size(), lambda w: w.size(1)),
    *(lambda w: w.dim(), lambda w: w.ndim, lambda w: w.numel(), lambda w: len(w), lambda w: w.is_cuda),
    *(lambda w: w.is_floating_point(), lambda w: w.requires_grad, lambda w: w.layout, lambda w: w.grad is None),
    *(lambda w: w.element_size(), lambda w: w.data.dtype, lambda w: w.detach().shape, lambda w: w.is_meta),
]
READS: list[Callable[[Tensor], Any]] = [
    *(lambda w: w.clone(), lambda w: w.t(), lambda w: w.T, lambda w: w.view(-1), lambda w: w[0], lambda w: w.sum()),
    *(lambda w: w.to(torch.float64), lambda w: w.float(), lambda w: w.contiguous(), lambda w: w + 1, lambda w: -w),
    *(lambda w: torch.ones(2, 4) @ w.t(), lambda w: functional.linear(torch.ones(2, 4), w), lambda w: w.tolist()),
    *(lambda w: torch.cat([w, w]), lambda w: torch.ones(3, 4) * w, lambda w: w == 0, lambda w: w.numpy()),
    *(lambda w: w.data.sum(), lambda w: w.detach().clone(), lambda w: w.zero_(), lambda w: torch.zeros_like(w)),
    *(lambda w: torch.ones(3, 4).copy_(w), lambda w: copy.deepcopy(w), lambda w: w.norm(), lambda w: w.data[0, 0]),
    *(lambda w: torch.stack([w]), lambda w: torch.einsum("oi,ti->to", w, torch.ones(2, 4)), lambda w: w.item()),
]


def shown(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return unread_weight(torch.zeros(6, dtype=torch.int8), (3, 4), dtype, "it is packed")


def test_questions_are_answered_as_the_real_weight_would() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        real, weight = torch.zeros(3, 4, dtype=dtype), shown(dtype)
        for number, ask in enumerate(QUESTIONS):
            assert ask(weight) == ask(real), number


@pytest.mark.parametrize("number", range(len(READS)))
def test_whatever_reads_or_writes_its_values_is_refused_with_the_reason(number: int) -> None:
    with pytest.raises(UsageError, match="it is packed"):
        READS[number](shown())


def test_what_a_library_has_put_on_the_real_one_is_found_on_it() -> None:
    held = nn.Parameter(torch.zeros(6))
    held.mark = 7  # type: ignore[attr-defined]
    weight: Any = unread_weight(held, (3, 4), torch.float32, "it is packed")
    assert weight.mark == 7 and not hasattr(weight, "other")


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "fp8"])
def test_a_packed_layer_shows_the_type_of_the_computation_and_its_logical_shape(storage: str) -> None:
    layer: Any = pack(torch.randn(12, 8), storage)
    layer.name, layer.compute_dtype = "block.wo", torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16 and tuple(layer.weight.shape) == (12, 8)
    with pytest.raises(UsageError, match=rf"reads the weight of block\.wo, which is held as {storage}"):
        layer.weight.sum()


def test_a_packed_layer_of_a_model_knows_its_name_and_the_models_type() -> None:
    import bitsandbytes

    model = tiny_model().to(torch.bfloat16)
    plain = model.model.layers[1].mlp.up_proj
    taken = bitsandbytes.nn.Linear4bit(32, 44, bias=False, quant_type="nf4").to("cpu")
    assert plain.weight.shape == (44, 32)
    model.model.layers[1].mlp.up_proj = taken
    attach(model, SubspaceConfig(rank=2, target_modules=["q_proj"]))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"reads the weight of model\.layers\.1\.mlp\.up_proj, which is held as nf4"):
        weight.float()


def test_a_layer_with_a_method_shows_its_weight_and_names_the_way_out() -> None:
    model = attach(tiny_model(), SubspaceConfig(rank=2, target_modules=["v_proj"]))
    weight = model.model.layers[0].self_attn.v_proj.weight
    assert weight.dtype == torch.float32 and tuple(weight.shape) == (16, 32)
    with pytest.raises(UsageError, match=r"v_proj, which has method lora on it, .*accepted: subspace.exclude_modules"):
        weight.t()
