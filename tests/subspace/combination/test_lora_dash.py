"""LoRA-Dash's layer: golden numbers, directions, and its exact form as a LoRA of a larger rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_subspace import (
    SubspaceConfig,
    advance,
    attach,
    load_adapter,
    parameter_groups,
    save_adapter,
    trainable_parameters,
)
from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import resolve
from dist_subspace.subspace.blocks.svd import every
from tests.subspace.golden import A, B, W, X, give, layer, opened
from tests.tiny_models import logits, tiny_model


def golden(directions: int = 1, delta: float = 0.3, **config):  # type: ignore[no-untyped-def]
    """After the switch, with the same strength in every direction."""
    module = layer("lora-dash", rank=2, alpha=4.0, options={"directions": directions}, **config)
    give(module, lora_A=A, lora_B=B)
    module.set_factors(module.decompose(opened(module)))
    return give(module, dash_delta=torch.full((len(module.dash_delta),), delta))


def test_coefficients_and_the_chosen_direction_are_the_golden_ones() -> None:
    module, found = golden(), every(W)
    c = module.coefficients(found.u, found.v)
    rates = c.abs() / (found.s + 1e-6)
    torch.testing.assert_close(c.abs(), torch.tensor([1.1713094476, 2.9151732679, 0.3361189841]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rates, torch.tensor([0.2213867226, 1.1190987931, 0.1872547578]), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.dash_U[:, 0], found.u[:, 1]) and torch.equal(module.dash_V[0], found.v[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_is_the_golden_one(transposed: bool) -> None:
    expected = torch.tensor([[6.4769974416, 8.4975319166, 0.4115979311]])
    torch.testing.assert_close(golden(transposed=transposed)(X), expected, rtol=1e-5, atol=1e-5)


def test_directions_come_in_the_order_of_their_rates_and_are_capped_at_the_smaller_side() -> None:
    module = golden(directions=8)
    assert len(module.dash_delta) == 3 and sum(p.numel() for p in module.trainables().values()) == 17
    found = every(W)
    assert torch.equal(module.dash_V, found.v[[1, 0, 2]])


def test_a_direction_is_chosen_by_its_change_for_its_size() -> None:
    """`W = diag(10, 1)` changed by diag(2, 1): more along the first direction, and more of the second."""
    resolved = resolve(SubspaceConfig(method="lora-dash", rank=2, alpha=2.0, options={"directions": 1}))
    matrix = torch.zeros(3, 4)
    matrix[0, 0], matrix[1, 1] = 10.0, 1.0
    module = resolved.method.build(pack(matrix, "fp32"), resolved.settings, torch.Generator(), None)
    give(module, lora_A=torch.eye(2, 4), lora_B=torch.tensor([[2.0, 0], [0, 1], [0, 0]]))
    assert module.decompose(opened(module))["dash_V"].abs().round(decimals=4).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_gradients_are_those_of_the_dense_formula_after_the_switch() -> None:
    module = golden(directions=2).double()
    module.base.weight.data = module.base.weight.data.double()
    x = X.double().requires_grad_(True)
    parameters = list(module.trainables().values())
    actual = torch.autograd.grad(module(x).square().sum(), [x, *parameters])
    dense = W.double() + 2 * module.lora_B @ module.lora_A + module.dash_U * module.dash_delta @ module.dash_V
    expected = torch.autograd.grad((x @ dense.t()).square().sum(), [x, *parameters])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_before_the_switch_delta_changes_nothing_and_gets_no_gradient() -> None:
    module = give(layer("lora-dash", rank=2, alpha=4.0), lora_A=A, lora_B=B, dash_delta=torch.ones(3))
    torch.testing.assert_close(module(X), torch.tensor([[6.5, 8, 0]]))
    module(X).sum().backward()
    assert not module.dash_delta.grad.any() and module.lora_A.grad.any()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_both_branches_see_the_same_dropped_input_and_backward_its_mask(p: float) -> None:
    module = golden(directions=2, dropout=p).train()
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(1, 4, requires_grad=True)
        y = module(x)
        rows = [torch.autograd.grad(y[0, i], x, retain_graph=True)[0] for i in range(3)]
        torch.testing.assert_close(torch.cat(rows) @ x.detach()[0], y.detach()[0])  # linear in x for a fixed mask
        grads = torch.autograd.grad(y[0, 0], [module.lora_B, module.dash_delta])
        rest = grads[0][0] @ module.lora_B[0] + grads[1] @ module.dash_delta
        torch.testing.assert_close((x @ W.t())[0, 0] + rest, y[0, 0])


def test_its_low_rank_form_is_exact() -> None:
    module = golden(directions=2)
    a, b = module.low_rank_form()
    assert a.shape == (4, 4) and b.shape == (3, 4)
    torch.testing.assert_close(W + b @ a, module.merged(W))


def test_a_saved_adapter_holds_its_directions(tmp_path: Path) -> None:
    model = attach(tiny_model(), SubspaceConfig(method="lora-dash", rank=2))
    for parameter in trainable_parameters(model):
        parameter.data.normal_(std=0.2)
    parts = [m for m in model.modules() if hasattr(m, "dash_U")]
    for part in parts:
        part.set_factors(part.decompose(opened(part)))
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert all(part.dash_U.any() for part in again.modules() if hasattr(part, "dash_U"))
    before = logits(again)
    advance(again, 50, 60)  # it has its directions already, which its strengths belong to
    assert torch.equal(logits(again), before)


def test_delta_is_in_a_group_of_its_own_without_decay() -> None:
    model = attach(tiny_model(), SubspaceConfig(method="lora-dash", rank=2, modules_to_save=["norm"]))
    for decay in (0.0, 0.1):
        groups = parameter_groups(model, 1e-3, decay)
        deltas = {id(m.dash_delta) for m in model.modules() if hasattr(m, "dash_U")}
        alone = [g for g in groups if deltas & {id(p) for p in g["params"]}]
        assert len(alone) == 1 and {id(p) for p in alone[0]["params"]} == deltas and alone[0]["weight_decay"] == 0


def test_a_nonlinearity_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="lora-dash cannot have: its directions are chosen by a linear ΔW"):
        resolve(SubspaceConfig(method="lora-dash", constraint="mpc_n"))


def test_nothing_that_is_not_trained_is_a_parameter() -> None:
    module = golden()
    assert isinstance(module, nn.Module)
    assert set(dict(module.named_parameters(recurse=False))) == {"lora_A", "lora_B", "dash_delta"}
