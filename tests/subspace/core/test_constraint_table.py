"""Which constraint goes with which method: the table of docs/methods.md, "Constraints by method", cell by cell."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, methods
from dist_subspace.errors import UsageError
from dist_subspace.subspace import resolve
from tests.subspace.golden import W, X, config_of, layer

LOW_RANK = ("lora", "rslora", "trilora", "adalora", "flexlora", "flora", "moslora")
CONSTRAINTS = ("mpc_o", "mpc_d", "mpc_n")
# Method -> the constraints it can have, and words of the reason why it cannot have each of the others.
TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(LOW_RANK, (CONSTRAINTS, "")),
    "parallel-adapter": (("mpc_o", "mpc_d"), "a nonlinearity between its factors already"),
    "liera": (("mpc_o", "mpc_d"), "is not linear"),
    "lora-dash": (("mpc_o", "mpc_d"), "linear ΔW"),
    **dict.fromkeys(("pissa", "milora", "olora"), (("mpc_o", "mpc_d"), "break the identity")),
    "dora": (("mpc_o", "mpc_d"), "linear update"),
    "lora-fa": (("mpc_n",), "its A is frozen"),
}
OTHERS = (
    (),
    "no pair of trained low-rank factors|frozen singular vectors|shifts of singular vectors|A and B are frozen",
)
CELLS = list(itertools.product(sorted(methods()), CONSTRAINTS))
ACCEPTED = [(method, kind) for method, kind in CELLS if kind in TABLE.get(method, OTHERS)[0]]
REFUSED = [cell for cell in CELLS if cell not in ACCEPTED]


def constrained(method: str, kind: str | None, **options: Any) -> Any:
    config = config_of(method, 2)
    return layer(method, **{**config, "constraint": kind, "options": {**config.get("options", {}), **options}})


def test_every_method_of_the_table_is_there() -> None:
    assert set(TABLE) <= set(methods())


@pytest.mark.parametrize(("method", "kind"), ACCEPTED)
def test_a_constraint_of_the_table_is_accepted(method: str, kind: str) -> None:
    constraint = constrained(method, kind).settings.constraint
    assert constraint.kind == kind and constraint.weight == 0.1 and constraint.reduction == "mean"
    assert kind in methods()[method].constraints


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_any_other_is_refused_with_the_reason(method: str, kind: str) -> None:
    accepted, reason = TABLE.get(method, OTHERS)
    names = ", ".join(("none", *accepted))
    message = (
        rf"subspace\.constraint is '{kind}', which method {method} cannot have: .*({reason}).*; accepted: {names}$"
    )
    with pytest.raises(UsageError, match=message):
        resolve(SubspaceConfig(method, constraint=kind))
    assert kind not in methods()[method].constraints


@pytest.mark.parametrize("method", sorted(methods()))
def test_unset_is_the_methods_own_and_none_switches_it_off(method: str) -> None:
    own = resolve(SubspaceConfig(method)).settings.constraint
    if method in ("adalora", "flexlora"):
        assert (own.kind, own.weight, own.power, own.reduction) == ("mpc_o", 0.1, 1, "mean")
    else:
        assert own is None
    assert resolve(SubspaceConfig(method, constraint="none")).settings.constraint is None


@pytest.mark.parametrize(("method", "kind"), [cell for cell in ACCEPTED if cell[1] != "mpc_n"])
def test_a_penalty_acts_on_both_trained_factors_and_in_dora_on_a_alone(method: str, kind: str) -> None:
    module = constrained(method, kind)
    a, b = module.constrained_factors()
    assert a.requires_grad and a.shape[1] == 4
    assert (b is None) if method == "dora" else (b.requires_grad and b.shape[0] == 3)
    assert methods()[method].options["power"].default == (1 if method in ("adalora", "flexlora") else 2)


@pytest.mark.parametrize("kind", ["mpc_o", "mpc_d"])
def test_where_a_penalty_costs_something_one_is_told(kind: str) -> None:
    for method in ("pissa", "milora", "olora"):
        notice = resolve(SubspaceConfig(method, constraint=kind)).notice
        assert notice.startswith(f"{kind} on {method}: ") and "spectrum" in notice
    assert "A alone" in resolve(SubspaceConfig("dora", constraint=kind)).notice
    assert resolve(SubspaceConfig("pissa")).notice is resolve(SubspaceConfig("lora", constraint=kind)).notice is None


@pytest.mark.parametrize("method", [method for method, kind in ACCEPTED if kind == "mpc_n"])
def test_mpc_n_is_a_relu_between_the_factors_and_does_not_merge(method: str) -> None:
    """`y = W x + γ B C σ(A x)`: bent where it is linear without, and the activation is an option."""
    module, linear = constrained(method, "mpc_n"), constrained(method, "none")
    for name, parameter in module.trainables().items():
        parameter.data = torch.linspace(-1, 1.5, parameter.numel()).view(parameter.shape)
        linear.get_parameter(name).data = parameter.data.clone()
    update, of_minus = module(X) - X @ W.t(), module(-X) + X @ W.t()
    assert not torch.allclose(update, -of_minus), "an odd function has no ReLU in it"
    torch.testing.assert_close(update - of_minus, linear(X) - X @ W.t())  # ReLU(t) - ReLU(-t) = t
    smooth = constrained(method, "mpc_n", activation="tanh")
    for name, parameter in module.trainables().items():
        smooth.get_parameter(name).data = parameter.data.clone()
    torch.testing.assert_close(smooth(X) - X @ W.t(), -(smooth(-X) + X @ W.t()))  # tanh is odd
    with pytest.raises(UsageError, match=rf"method {method} with constraint mpc_n cannot be merged"):
        module.merged(W)
    assert module.low_rank_form() is None and (module.peft is None or not module.peft.agrees(module))
