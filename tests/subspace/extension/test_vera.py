"""VeRA: golden numbers, PEFT's projections and outputs, one pair for all layers, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.subspace import SubspaceLinear, attached, resolve
from tests.matrix import tiny
from tests.subspace.golden import BIAS, A, B, G, W, X, give, layer
from tests.subspace.peft_reference import peft_model
from tests.tiny_models import odd_model

D, L = torch.tensor([0.5, -1]), torch.tensor([2.0, -1, 0.5])


def golden(**config: Any) -> SubspaceLinear:
    module = give(layer("vera", rank=2, **config), vera_lambda_d=D, vera_lambda_b=L)
    module.projections.a.data.copy_(A)
    module.projections.b.data.copy_(B)
    return module


def formula(x: Tensor, d: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return x @ W.t() + l * ((d * (x @ A.t())) @ B.t())


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    torch.testing.assert_close(golden(transposed=transposed)(X), torch.tensor([[3.5, 6, 2.75]]))


def test_gradients_are_those_of_the_formula() -> None:
    module = golden()
    x = torch.randn(2, 5, 4, requires_grad=True)
    inputs = [x, module.vera_lambda_d, module.vera_lambda_b]
    g = G.expand(2, 5, 3)
    actual = torch.autograd.grad(module(x), inputs, g)
    expected = torch.autograd.grad(formula(*inputs), inputs, g)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_backward_keeps_neither_x_nor_a_projection() -> None:
    module, kept = golden(), []
    x = torch.randn(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        module(x)
    assert sorted(kept) == [(2,), (2, 50), (3,)]


def test_five_values_are_trained() -> None:
    module = layer("vera", rank=2, options={"d_init": 0.3})
    assert sum(p.numel() for p in module.trainables().values()) == 5
    assert not module.vera_lambda_b.any() and torch.equal(module.vera_lambda_d, torch.full((2,), 0.3))


def test_it_is_exactly_a_lora() -> None:
    down, up = golden().low_rank_form()
    torch.testing.assert_close(W + up @ down, golden().merged(W))


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_computes_the_same_from_the_file(transposed: bool) -> None:
    module = golden(bias=True)
    torch.testing.assert_close(peft_model(module, transposed=transposed)(X), torch.tensor([[3.5, 6, 2.75]]) + BIAS)


@pytest.mark.parametrize("seed", [0, 7])
def test_projections_are_bit_for_bit_those_that_peft_draws(seed: int) -> None:
    model = dsub.attach(odd_model("llama"), SubspaceConfig("vera", rank=5, options={"projection_seed": seed}))
    config = peft.VeraConfig(r=5, target_modules="all-linear", projection_prng_key=seed)
    theirs = peft.get_peft_model(odd_model("llama"), config)
    ours = adapter_tensors(model)
    assert torch.equal(ours["base_model.vera_A"], theirs.base_model.vera_A["default"])
    assert torch.equal(ours["base_model.vera_B"], theirs.base_model.vera_B["default"])
    assert ours["base_model.vera_A"].shape == (5, 45) and ours["base_model.vera_B"].shape == (45, 5)


def trained() -> torch.nn.Module:
    model = dsub.attach(odd_model("llama"), SubspaceConfig("vera", rank=5))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in dsub.trainable_parameters(model):
            parameter.normal_()
    return model


def test_a_whole_model_agrees_with_pefts() -> None:
    """Every layer takes its slice of the one pair: widths here are 6, 18, 35 and 45."""
    model, ids = trained(), tiny.global_batch(0)
    part = model.get_submodule(attached(model).layers[0])
    config = peft.VeraConfig(target_modules="all-linear", **{**part.peft.entries(part.settings)})
    theirs = peft.get_peft_model(odd_model("llama"), config)
    found = peft.set_peft_model_state_dict(theirs, adapter_tensors(model))
    assert not found.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_all_layers_share_one_pair() -> None:
    model = trained()
    parts = [m for m in model.modules() if isinstance(m, SubspaceLinear)]
    assert len({id(part.projections) for part in parts}) == 1 and len(parts) == 14
    assert sum(part.in_file for part in parts) == 1


def test_projections_are_in_the_file_or_drawn_from_the_seed_again(tmp_path: Path) -> None:
    ids, source = tiny.global_batch(0), trained()
    dsub.save_adapter(source, tmp_path / "whole")
    with torch.no_grad():
        again = dsub.load_adapter(odd_model("llama"), tmp_path / "whole")
        assert torch.equal(again(input_ids=ids).logits, source(input_ids=ids).logits)
    config = SubspaceConfig("vera", rank=5, options={"save_projection": False})
    tensors = adapter_tensors(dsub.attach(odd_model("llama"), config))
    assert not any("vera_A" in key or "vera_B" in key for key in tensors) and len(tensors) == 28


def test_an_unset_rank_is_cut_to_the_smallest_layer_and_a_given_one_refused() -> None:
    model = dsub.attach(odd_model("llama"), SubspaceConfig("vera"))
    assert {model.get_submodule(name).settings.rank for name in attached(model).layers} == {6}
    with pytest.raises(UsageError, match=r"subspace\.rank is 64"):
        dsub.attach(odd_model("llama"), SubspaceConfig("vera", rank=64))


def test_layers_cannot_have_ranks_of_their_own() -> None:
    with pytest.raises(UsageError, match=r"rank_pattern is \{'q_proj': 3\}, but the layers of vera share one A"):
        resolve(SubspaceConfig("vera", rank_pattern={"q_proj": 3}))


def test_dropout_acts_on_the_branch_in_training_alone() -> None:
    module = golden(dropout=0.5)
    torch.testing.assert_close(module.eval()(X), torch.tensor([[3.5, 6, 2.75]]))
    module.train()
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(1, 4, requires_grad=True)
        y = module(x)  # linear in x for a fixed mask
        rows = [torch.autograd.grad(y[0, i], x, retain_graph=True)[0] for i in range(3)]
        torch.testing.assert_close(torch.cat(rows) @ x.detach()[0], y.detach()[0])
