"""MiSS against numbers worked out by hand, and against PEFT's own layer."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import W, X, give, layer
from tests.subspace.peft_reference import One, file_of
from tests.tiny_models import tiny_model

# W x = [0.5 4 4]. Shards of two inputs: h = [1 - 1, 2 + 0.5]; of three, the last cut short: h = [1 + 0.5, 2, -1].
GOLDEN: dict[str, tuple[list[list[float]], dict[str, Any], list[float]]] = {
    "two shards": ([[1, 0, 2], [0, 1, -1]], {}, [0.5, 6.5, 1.5]),
    "a shard cut short": ([[1, 0, 2], [0, 1, -1], [1, 1, 0]], {}, [1, 5, 5]),
    "one input a shard": ([[1, 2, 3]], {}, [3, 9, 11.5]),
    "as many as inputs": ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0]], {}, [2.5, 6, 3]),
    "one column for all": ([[1], [2]], {"mini_r": 1}, [5.5, 9, 9]),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", GOLDEN)
def test_forward_and_merge_are_the_golden_ones(case: str, transposed: bool) -> None:
    rows, options, expected = GOLDEN[case]
    block = torch.tensor(rows, dtype=torch.float32)
    part = give(layer("miss", rank=len(rows), transposed=transposed, options=options), miss_block=block)
    right = torch.tensor([expected], dtype=torch.float32)
    torch.testing.assert_close(part(X), right)
    torch.testing.assert_close(X @ part.merged(W).t(), right)
    a, b = part.low_rank_form()
    assert a.shape == (len(rows), 4) and b.shape == (3, len(rows))
    torch.testing.assert_close(X @ (W + b @ a).t(), right)


def test_a_block_of_zeros_is_trained() -> None:
    part = layer("miss", rank=2)
    assert {name: tuple(p.shape) for name, p in part.trainables().items()} == {"miss_block": (2, 3)}
    assert not part.miss_block.any() and torch.equal(part(X), part.base(X))


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("mini", [None, 2, 6])
def test_pefts_layer_computes_and_merges_the_same(rank: int, mini: int | None) -> None:
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(2, 3, 8)
    resolved = resolve(SubspaceConfig("miss", rank=rank, options={"mini_r": mini}))
    part: Any = resolved.method.build(pack(weight, "fp32", bias=bias), resolved.settings, torch.Generator(), None)
    part.miss_block.data.normal_()
    config = peft.get_peft_config({"peft_type": "MISS", "target_modules": ["proj"], **part.peft.entries(part.settings)})
    model = peft.get_peft_model(One(weight, bias, False), config)
    assert not peft.set_peft_model_state_dict(model, file_of(part.file_tensors())).unexpected_keys
    torch.testing.assert_close(part(x), model.eval()(x))
    torch.testing.assert_close(part.merged(weight), model.merge_and_unload().proj.weight)


def test_backward_keeps_the_sums_of_the_shards_and_no_input() -> None:
    resolved = resolve(SubspaceConfig("miss", rank=2))
    part = resolved.method.build(pack(torch.randn(5, 64), "fp32"), resolved.settings, torch.Generator(), None)
    x, kept = torch.randn(50, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        part(x)
    assert kept and max(kept) <= 2 * 50


def test_columns_that_do_not_fill_the_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mini_r is 5, but a target has 32 outputs; accepted: null, or a divisor"):
        dsub.attach(tiny_model(), SubspaceConfig("miss", rank=2, options={"mini_r": 5}))


def test_a_rank_may_be_as_large_as_the_inputs_and_an_unset_one_is_cut_to_them() -> None:
    model = nn.Sequential(nn.Linear(12, 3))
    assert dsub.attach(model, SubspaceConfig("miss", rank=12, target_modules=["0"]))[0].miss_block.shape == (12, 3)
    own = dsub.attach(nn.Sequential(nn.Linear(12, 3)), SubspaceConfig("miss", target_modules=["0"]))
    assert own[0].miss_block.shape == (12, 3)
    with pytest.raises(UsageError, match=r"subspace.rank is 13, but 0 is 3 x 12; accepted: at most 12"):
        dsub.attach(nn.Sequential(nn.Linear(12, 3)), SubspaceConfig("miss", rank=13, target_modules=["0"]))
