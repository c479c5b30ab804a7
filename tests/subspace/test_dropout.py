"""Dropout of every method against its definition (docs/methods.md), for the mask that was really drawn.

A part is asked for one unit vector after the other under the same seed: what comes back beside the frozen share is a multiple of
the trained share of that vector, and the multiples are the mask. With it the definition, in float64 under ordinary autograd and
with decompositions of its own, must give the output and every gradient of any input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, advance, attach, methods
from dist_subspace.subspace import attached, resolve
from tests.tiny_models import tiny_inputs, tiny_model

P = 0.3  # no dropout looks like its complement
RANK, ALPHA = 3, 5.0
IN, OUT, TOKENS = 12, 9, 16

# What docs/methods.md says: these have a branch whose input is dropped.
WITH = (
    *("lora", "rslora", "lora-fa", "dora", "pissa", "milora", "olora", "trilora", "adalora", "flexlora", "flora"),
    *("moslora", "liera", "sam-parser", "svdiff", "spectral-additive", "spectral-rotational", "lora-dash", "vera"),
    *("parallel-adapter", "lora-xs", "miss"),
)
WITHOUT = ("ssl", "ssb", "ia3", "bitfit", "houlsby", "pfeiffer", "prefix", "prompt", "p-tuning", "oft")

Values = dict[str, Tensor]
Share = Callable[[Tensor], Tensor]  # of x (tokens, d_in), without the frozen one


@dataclass(frozen=True)
class Case:
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    constraint: str | None = None

    def __str__(self) -> str:
        return "-".join([self.method, *map(str, self.options.values()), *filter(None, [self.constraint])])


NONLINEAR = ("lora", "rslora", "lora-fa", "trilora", "adalora", "flexlora", "flora", "moslora")
LINEAR = [
    *(Case(method) for method in WITH if method != "parallel-adapter"),
    *(Case(method, {"residual": "fold"}) for method in ("pissa", "milora", "olora")),
    Case("liera", {"form": "exp"}),
    Case("dora", {"differentiate_norm": True}),
    Case("spectral-rotational", {"gain": True}),
    Case("miss", {"mini_r": 3}),
]
CASES = [*LINEAR, *(Case(method, constraint="mpc_n") for method in NONLINEAR)]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.proj = nn.Linear(IN, OUT, dtype=torch.float32)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(case: Case, dropout: float = P) -> Any:
    """The model in evaluation, with random trained values and no penalty; LoRA-Dash is past its switch."""
    config = SubspaceConfig(
        method=case.method,
        rank=RANK,
        alpha=ALPHA,
        dropout=dropout,
        target_modules=["proj"],
        options=case.options,
        constraint=case.constraint or "none",
    )
    model: Any = attach(One(), config)
    generator = torch.Generator().manual_seed(7)
    for switched in (False, True):
        for value in model.proj.trainables().values():
            value.data.add_(0.4 * torch.randn(value.shape, generator=generator))
        if not switched:
            advance(model, 1, 3)
    return model


# The definitions: the frozen matrix, and the trained share of x, from W and the trained values.


def values_of(part: Any) -> Values:
    """Trained values as float64 leaves, and the frozen draws that no definition can know."""
    found = {name: p.detach().double().requires_grad_() for name, p in part.trainables().items()}
    if part.info.name == "lora-fa":
        found["lora_A"] = part.lora_A.matrix.double()
    if part.info.name == "vera":
        found |= {"vera_A": part.projections.a.double(), "vera_B": part.projections.b.double()}
    return found


def core_of(case: Case, v: Values) -> Tensor:
    """C of `B C A`."""
    if case.method == "flexlora":  # half of its triplets are not active
        return torch.diag(v["lora_E"] * (torch.arange(len(v["lora_E"])) < RANK))
    if "lora_E" in v:
        return torch.diag(v["lora_E"])
    return v.get("lora_G", torch.eye(v["lora_A"].shape[0], dtype=torch.float64))


def gamma(method: str) -> float:
    return {"rslora": ALPHA / RANK**0.5, "adalora": ALPHA / 5}.get(method, ALPHA / RANK)  # AdaLoRA starts with ⌈1.5 r⌉


def triplets(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V with the sign rule: the largest entry of each u is positive."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0)[None])[0].sign()
    return u * signs, s, v * signs[:, None]


def taken_out(method: str, w: Tensor) -> Tensor:
    """`γ B0 A0`."""
    if method == "olora":
        q, r = torch.linalg.qr(w)
        return gamma(method) * q[:, :RANK] @ r[:RANK]
    u, s, v = triplets(w)
    part = slice(0, RANK) if method == "pissa" else slice(-RANK, None)
    return (u[:, part] * s[part]) @ v[part]


def cayley(p: Tensor) -> Tensor:
    k, identity = (p - p.t()) / 2, torch.eye(len(p), dtype=p.dtype)
    return (identity - k) @ torch.linalg.inv(identity + k)


def spectral(case: Case, w: Tensor, v: Values) -> Tensor:
    u, s, vt = triplets(w)
    if case.method == "sam-parser":
        return (u * v["sam_parser_sigma"]) @ vt
    if case.method == "svdiff":
        return (u * (torch.relu(s + v["svdiff_delta"]) - s)) @ vt
    u, s, vt = u[:, :RANK], s[:RANK], vt[:RANK]
    if case.method == "lora-xs":
        return gamma(case.method) * (u * s) @ v["lora_xs_R"] @ vt
    if case.method == "spectral-additive":
        return ((u + v["spectral_P"]) * s) @ (vt + v["spectral_Q"].t()) - (u * s) @ vt
    gained = s * (1 + v["spectral_gain"]) if case.options.get("gain") else s
    return u @ (cayley(v["spectral_P"]) @ torch.diag(gained) @ cayley(v["spectral_Q"]).t() - torch.diag(s)) @ vt


def trained_matrix(case: Case, part: Any, w: Tensor, v: Values) -> Tensor:
    """What acts on `D(x)`."""
    if v.keys() & {"spectral_P", "svdiff_delta", "sam_parser_sigma", "lora_xs_R"}:
        return spectral(case, w, v)
    if case.method == "miss":  # of output o and input i: column o of the block (repeated), row i (modulo its rows)
        rows, columns = v["miss_block"].shape
        return v["miss_block"].t()[torch.arange(OUT) % columns][:, torch.arange(IN) % rows]
    if case.method == "vera":
        return (v["vera_lambda_b"][:, None] * v["vera_B"]) @ (v["vera_lambda_d"][:, None] * v["vera_A"])
    update = gamma(case.method) * v["lora_B"] @ core_of(case, v) @ v["lora_A"]
    if case.method == "liera":
        return w * (torch.expm1(update) if case.options else update)
    if case.method == "lora-dash":
        return update + (part.dash_U.double() * v["dash_delta"]) @ part.dash_V.double()
    if case.method == "dora":
        n = (w + update).norm(dim=1)
        m = w.norm(dim=1) + v["lora_magnitude_vector"]
        return (m / (n if case.options else n.detach()))[:, None] * (w + update) - w
    return update


@dataclass
class Opened:
    """A model and its definition: the frozen share of x, and the trained share of what is left of x."""

    model: Any
    bias: Tensor
    frozen: Tensor
    share: Share
    values: Values

    def output(self, x: Tensor, mask: Tensor | float) -> Tensor:
        """For `x (..., IN)` and a mask `(TOKENS, IN)`, float64."""
        rows = x.double().reshape(-1, IN)
        return (self.bias + rows @ self.frozen.t() + self.share(mask * rows)).view(*x.shape[:-1], OUT)

    def drawn_mask(self, seed: int) -> Tensor:
        """`(TOKENS, IN)`: what each input of each token is multiplied by, under that seed."""
        found = []
        for unit in torch.eye(IN, dtype=torch.float64):
            unit = max(unit, -unit, key=lambda e: float(self.share(e[None]).norm()))  # a ReLU may cut one of the two
            torch.manual_seed(seed)
            y = self.model(unit.float().expand(2, TOKENS // 2, IN)).double().reshape(TOKENS, OUT)
            own, column = y - self.bias - self.frozen @ unit, self.share(unit[None])[0]
            factor = own @ column / column.square().sum()
            rest = own - factor[:, None] * column
            assert rest.abs().max() < 1e-4 * column.norm(), "no multiple of the trained share"
            found.append(factor)
        return torch.stack(found, 1)


def opened(case: Case, dropout: float = P) -> Opened:
    model, plain = adapted(case, dropout), One().proj
    w, bias, values = plain.weight.detach().double(), plain.bias.detach().double(), values_of(model.proj)
    if case.constraint == "mpc_n":
        left = values["lora_B"] @ core_of(case, values)
        return Opened(
            model, bias, w, lambda x: gamma(case.method) * torch.relu(x @ values["lora_A"].t()) @ left.t(), values
        )
    frozen = w - taken_out(case.method, w) if case.method in ("pissa", "milora", "olora") else w
    change = trained_matrix(case, model.proj, w, values)
    return Opened(model, bias, frozen, lambda x: x @ change.t(), values)


def some_x() -> Tensor:
    return torch.randn(2, TOKENS // 2, IN, generator=torch.Generator().manual_seed(3))


@each_case
def test_in_training_a_part_computes_its_definition_for_the_mask_that_was_drawn(case: Case) -> None:
    known = opened(case)
    model = known.model.train()
    with torch.no_grad():
        mask = known.drawn_mask(seed=5)
    kept = mask > 0.5
    scaled = kept.double() / (1 - P)
    torch.testing.assert_close(mask, scaled, rtol=1e-3, atol=1e-3, msg=lambda m: f"not 0 or 1/(1-p): {m}")
    assert abs(float(kept.double().mean()) - (1 - P)) < 0.1, "dropped with another probability"
    assert len({tuple(row.tolist()) for row in kept}) > TOKENS // 2, "tokens share a mask"
    x = some_x().requires_grad_()
    torch.manual_seed(5)
    y, wide = model(x), x.detach().double().requires_grad_()
    right = known.output(wide, scaled)
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    trained = model.proj.trainables()
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad(y, [x, *trained.values()], g)
    theirs = torch.autograd.grad(right, [wide, *(known.values[name] for name in trained)], g.double())
    for name, mine, reference in zip(["x", *trained], ours, theirs, strict=True):
        least = 1e-4 * max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(mine.double(), reference, rtol=1e-3, atol=least, msg=lambda m, n=name: f"{n}: {m}")


def no_draw(model: Any, x: Tensor) -> Tensor:
    """What it computes, without a random number."""
    before = torch.get_rng_state()
    y = model(x)
    assert torch.equal(torch.get_rng_state(), before), "a random number was drawn"
    return y


@each_case
def test_in_evaluation_and_without_a_probability_nothing_is_dropped(case: Case) -> None:
    """A model that was attached in evaluation is in evaluation; one call after another gives the same bits."""
    known, x = opened(case), some_x()
    model = known.model
    assert not model.proj.training
    y = no_draw(model, x)
    torch.testing.assert_close(y.double(), known.output(x, 1.0), rtol=1e-4, atol=1e-4)
    torch.manual_seed(99)
    with torch.no_grad():
        assert torch.equal(model.train().eval()(x), y)
    without = adapted(case, dropout=0.0).train()
    torch.testing.assert_close(no_draw(without, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*CASES, Case("parallel-adapter")], ids=str)
def test_every_call_draws_anew_and_checkpointing_draws_again_what_it_drew(case: Case) -> None:
    model, x = adapted(case).train(), some_x().requires_grad_()
    trained = [x, *model.proj.trainables().values()]
    torch.manual_seed(6)
    first = model(x)
    assert not torch.allclose(first, model(x), atol=1e-3), "two calls have one mask"
    torch.manual_seed(6)
    torch.randn(9, generator=torch.Generator().manual_seed(1))  # another generator's draws change nothing
    assert torch.equal(model(x), first), "the mask is no function of the seed"
    plain = torch.autograd.grad(first.square().sum(), trained)
    for reentrant in (True, False):
        for tensor in trained:
            tensor.grad = None
        torch.manual_seed(6)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        torch.manual_seed(77)  # what is drawn between forward and recomputation
        y.square().sum().backward()
        for tensor, reference in zip(trained, plain, strict=True):
            torch.testing.assert_close(tensor.grad, reference, rtol=1e-4, atol=1e-5)


def test_the_parallel_adapter_drops_its_activations() -> None:
    """`y = W x + c B D(ReLU(A x))`: the mask is read off by solving for what B multiplies."""
    model: Any = adapted(Case("parallel-adapter", {"scale": 2.0}))
    w, bias = One().proj.weight.detach().double(), One().proj.bias.detach().double()
    a, b = (t.detach().double() for t in (model.proj.lora_A, model.proj.lora_B))
    x = some_x().requires_grad_()
    hidden = torch.relu(x.detach().double().view(TOKENS, IN) @ a.t())
    frozen = x.detach().double().view(TOKENS, IN) @ w.t() + bias

    def multiplied(y: Tensor) -> Tensor:
        return (y.detach().double().view(TOKENS, OUT) - frozen) / 2.0 @ torch.linalg.pinv(b).t()

    torch.testing.assert_close(multiplied(no_draw(model, x)), hidden, rtol=1e-4, atol=1e-4)
    model.train()
    torch.manual_seed(5)
    y = model(x)
    alive = hidden > 0.05
    mask = multiplied(y) / hidden.where(alive, 1.0)
    kept = mask > 0.5
    scaled = kept.double() / (1 - P)
    torch.testing.assert_close(mask[alive], scaled[alive], rtol=1e-3, atol=1e-3)
    assert 0.5 < float(kept[alive].double().mean()) < 0.9
    wide, la, lb = (t.detach().double().requires_grad_() for t in (x, a, b))
    share = torch.relu(wide.view(TOKENS, IN) @ la.t()) * scaled @ lb.t()
    right = (bias + wide.view(TOKENS, IN) @ w.t() + 2.0 * share).view(y.shape)
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad(y, [x, model.proj.lora_A, model.proj.lora_B], g)
    for mine, reference in zip(ours, torch.autograd.grad(right, [wide, la, lb], g.double()), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-3, atol=1e-4)


def test_the_methods_with_dropout_are_these() -> None:
    assert {name for name, info in methods().items() if info.uses_dropout} == set(WITH)
    assert set(WITH) | set(WITHOUT) == methods().keys()


@pytest.mark.parametrize("method", WITHOUT)
def test_a_method_without_dropout_says_that_it_is_unused_and_drops_nothing(method: str) -> None:
    config = SubspaceConfig(method=method, rank=2 if methods()[method].uses_rank else None, dropout=0.5)
    assert "dropout" in resolve(config).unused
    model = attach(tiny_model(), config).train()
    assert attached(model).settings.dropout == 0
    inputs = tiny_inputs(model)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
