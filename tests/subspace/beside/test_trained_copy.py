"""A module trained in full: a float32 copy beside the frozen original, tied where the original is, as its checkpoint has it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_subspace.storage import adopt_all
from dist_subspace.subspace.beside.trained_copy import TrainedCopy


def gathered(parameters: Any) -> Any:
    return contextlib.nullcontext()


def copy_of(module: nn.Module, shared: dict[int, nn.Parameter] | None = None) -> TrainedCopy:
    return TrainedCopy(module, gathered, {} if shared is None else shared)


def frozen(module: nn.Module) -> nn.Module:
    """In a model whose linear layers are frozen operators."""
    model = nn.ModuleDict({"inner": module})
    adopt_all(model)
    return model["inner"]


def test_the_copy_is_trained_in_float32_and_the_original_stays() -> None:
    original = nn.Embedding(5, 4).to(torch.bfloat16)
    before = original.weight.detach().clone()
    trained = copy_of(original)
    ids = torch.tensor([1, 3])
    assert trained(ids).dtype == torch.bfloat16 and torch.equal(trained(ids), original(ids))
    assert trained.weight.dtype == torch.float32 and trained.weight.requires_grad
    trained.weight.data.add_(1)
    assert torch.equal(original.weight, before) and not torch.equal(trained(ids), original(ids))
    trained.enabled = False
    assert torch.equal(trained(ids), original(ids)) and trained.weight is original.weight


def test_a_head_computes_in_float32_where_a_loss_wants_it() -> None:
    trained = copy_of(frozen(nn.Linear(4, 3).to(torch.bfloat16)))
    assert trained(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert set(trained.trainables()) == {"weight", "bias"}


def test_modules_that_are_tied_stay_tied() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    shared: dict[int, nn.Parameter] = {}
    one, other = copy_of(table, shared), copy_of(frozen(head), shared)
    assert one.weight is other.weight and one.weight is not table.weight
    assert copy_of(nn.Embedding(5, 4), shared).weight is not one.weight


@pytest.mark.parametrize("nested", [False, True])
def test_a_conv1d_is_in_the_file_as_the_checkpoint_has_it(nested: bool) -> None:
    layer = Conv1D(3, 4)
    trained = copy_of(frozen(nn.Sequential(nn.LayerNorm(4), layer) if nested else layer))
    key = "1.weight" if nested else "weight"
    held = dict(trained.trained.named_parameters())[key]
    assert held.shape == (3, 4)
    written = {name: tensor.clone() for name, tensor in trained.file_tensors().items()}
    torch.testing.assert_close(written[key], layer.weight)
    held.data.zero_()
    trained.load_file_tensors(written)
    torch.testing.assert_close(held.t(), layer.weight)
    assert all(torch.equal(written[name], tensor) for name, tensor in trained.file_tensors().items())


def test_buffers_that_count_are_copied_and_not_trained() -> None:
    norm = nn.BatchNorm1d(3)
    trained = copy_of(norm)
    assert set(trained.trainables()) == {"weight", "bias"}
    trained(torch.randn(4, 3) + 5)
    assert not norm.running_mean.any() and trained.trained.running_mean.any()  # type: ignore[union-attr,operator]
