"""A head that its loss is made in computes what the module computes, in any storage; other modules are none."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from dist_subspace import SubspaceConfig, attach
from dist_subspace.storage import adopt_all, operator, pack, storages
from dist_subspace.subspace.beside.trained_copy import TrainedCopy
from dist_subspace.training.cross_entropy_in_pieces import cross_entropy_in_pieces
from dist_subspace.training.head_kinds import InPieces, head_of
from tests.tiny_models import odd_model


def gathered(parameters: Any) -> Any:
    return contextlib.nullcontext()


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24, bias=bias).to(dtype)


def frozen(storage: str) -> nn.Module:
    plain = linear()
    return pack(plain.weight.detach(), storage, bias=plain.bias.detach())


def assert_is_the_module(module: nn.Module, dtype: torch.dtype) -> None:
    head = head_of(module, dtype)
    assert head is not None and head.classes == 24
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = module(x)
    g = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (expected,) = torch.autograd.grad(y, x, g)
    found = head.logits(x.detach().to(head.dtype))
    assert found.dtype == y.dtype == head.dtype and not found.requires_grad
    torch.testing.assert_close(found, y.detach())
    if not isinstance(head, InPieces):
        torch.testing.assert_close(head.backward(g).to(dtype), expected)
        return
    targets = torch.arange(5)
    for_loss = nn.functional.cross_entropy(y, targets, reduction="sum")
    (expected,) = torch.autograd.grad(for_loss, x)
    loss = cross_entropy_in_pieces(x, None, targets, head, None)
    torch.testing.assert_close(loss, for_loss)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("storage", storages())
def test_a_frozen_operator_is_one_in_every_storage(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "DECODED", 1)  # entries: as few rows at a time as the storage can decode
    assert_is_the_module(frozen(storage), torch.bfloat16 if storage == "bf16" else torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_layer_is_one_and_says_what_of_it_is_trained(bias: bool) -> None:
    layer = linear(torch.bfloat16, bias)
    assert_is_the_module(layer, torch.bfloat16)
    head = head_of(layer, torch.bfloat16)
    assert head is not None and head.weight is layer.weight and head.bias is layer.bias
    layer.requires_grad_(False)
    head = head_of(layer, torch.bfloat16)
    assert head is not None and head.weight is None and head.bias is None


def test_a_copy_that_is_trained_is_one_in_float32_and_switched_off_it_is_none() -> None:
    model = nn.ModuleDict({"head": linear(torch.bfloat16)})
    adopt_all(model)
    copy = TrainedCopy(model["head"], gathered, {})
    assert_is_the_module(copy, torch.bfloat16)
    head = head_of(copy, torch.bfloat16)
    assert head is not None and head.weight is copy.trained.weight
    copy.enabled = False
    assert head_of(copy, torch.bfloat16) is None


def test_other_layers_are_none() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert head_of(Other(3, 4), torch.float32) is None and head_of(None, torch.float32) is None
    assert head_of(linear(torch.float32), torch.bfloat16) is None  # which would fail
    model = attach(odd_model("llama"), SubspaceConfig(method="lora", rank=2, target_modules=["lm_head"]))
    assert head_of(model.lm_head, torch.float32) is None
