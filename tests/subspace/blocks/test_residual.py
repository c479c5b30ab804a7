"""Stacked and folded residuals of PiSSA, MiLoRA and OLoRA, and the rounds of QPiSSA and LoftQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, SubspaceLinear, Weight, resolve
from dist_subspace.subspace.blocks.residual import Fit, best, loftq, qpissa
from dist_subspace.subspace.blocks.svd import largest_exact, smallest
from dist_subspace.subspace.core.operator import no_original
from tests.subspace.golden import LOFTQ, TOY, moved, opened, settled, toy_quantiser

METHODS = ["pissa", "milora", "olora"]
SHAPES = [(12, 8), (8, 12), (9, 9)]
each = pytest.mark.parametrize("method", METHODS)


def on(matrix: Tensor, storage: str = "fp32", *, original: bool = False, **config: Any) -> SubspaceLinear:
    resolved = resolve(SubspaceConfig(**{"rank": 3, **config}))
    part = resolved.method.build(pack(matrix, storage), resolved.settings, torch.Generator().manual_seed(0), None)
    return settled(part, matrix if original else None)


# The toy of the golden numbers.


def toy_split(rank: int) -> Any:
    return lambda matrix: largest_exact(matrix, rank).balanced()


QPISSA = {
    1: [0.4317005918, 0.3880799086, 0.3662150405, 0.3604000168, 0.3544162471],
    2: [0.3971584784, 0.2878423018, 0.2688373190, 0.2703560226, 0.2714308878],
}


def test_the_toy_is_the_golden_one() -> None:
    torch.testing.assert_close(TOY[0, 0].item(), 3.9092974268, rtol=0, atol=1e-9)
    torch.testing.assert_close(TOY.norm().item(), 16.8809716398, rtol=0, atol=1e-9)
    torch.testing.assert_close((toy_quantiser(TOY) - TOY).norm().item(), 1.1670912512, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_rounds_of_qpissa_err_as_the_golden_ones(rank: int) -> None:
    split = toy_split(rank)
    errors = [fit.error for fit in qpissa(TOY, toy_quantiser, split, split, 1.0, 5)]
    torch.testing.assert_close(errors, QPISSA[rank], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_rounds_of_loftq_err_as_the_golden_ones(rank: int) -> None:
    nothing = TOY.new_zeros(rank, 12), TOY.new_zeros(8, rank)
    errors = [fit.error for fit in loftq(TOY, toy_quantiser, toy_split(rank), nothing, 1.0, 5)]
    torch.testing.assert_close(errors, LOFTQ[rank], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.2096259114), (2, 1.1599240311)])
def test_a_residual_without_the_smallest_triplets_errs_as_the_golden_one(rank: int, expected: float) -> None:
    split: Any = lambda matrix: smallest(matrix, rank).balanced()  # noqa: E731
    (fit,) = qpissa(TOY, toy_quantiser, split, split, 1.0, 1)
    torch.testing.assert_close(fit.error, expected, rtol=0, atol=1e-6)


def test_the_best_round_is_kept_the_first_of_equals() -> None:
    pairs = [(torch.zeros(1), torch.zeros(n)) for n in range(3)]
    fits = [Fit(pair, pair, error) for pair, error in zip(pairs, [2.0, 1.0, 1.0], strict=True)]
    assert best(iter(fits)) is fits[1]


@pytest.mark.parametrize("method", ["pissa", "milora"])
@pytest.mark.parametrize("rank", [1, 2])
def test_more_rounds_never_leave_a_larger_error_than_fewer(method: str, rank: int) -> None:
    def error(rounds: int) -> float:
        options = {"residual": "fold", "iterations": rounds}
        resolved = resolve(SubspaceConfig(method=method, rank=rank, alpha=3.0 * rank, options=options))
        part = resolved.method.build(pack(TOY.float(), "nf4"), resolved.settings, torch.Generator(), None)
        weight = Weight(part.base.dense(), lambda: TOY.float(), lambda m: toy_quantiser(m), torch.Generator())
        factors = part.decompose(weight)
        rebased = part.rebased(factors, weight)
        return float((toy_quantiser(rebased) + 3.0 * factors["lora_B0"] @ factors["lora_A0"] - TOY).norm())

    errors = [error(rounds) for rounds in (1, 2, 3, 4, 5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    if method == "pissa":
        kept = [min(QPISSA[rank][: n + 1]) for n in range(5)]
        torch.testing.assert_close(errors, kept, rtol=0, atol=1e-5)


def test_later_rounds_of_milora_fit_the_largest_of_what_the_quantiser_left() -> None:
    """The rounds written out: the smallest triplet of W, then the largest of `W - Q(W - B A)`; the best of them is taken."""

    def triplet(matrix: Tensor, number: int) -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return s[number] * torch.outer(u[:, number], v[number])

    rest, found = TOY, []
    for number in range(4):
        product = triplet(rest, 0 if number else -1)
        rest = TOY - toy_quantiser(TOY - product)
        found.append((float((rest - product).norm()), product))
    assert min(found, key=lambda pair: pair[0]) is not found[0]
    resolved = resolve(SubspaceConfig(method="milora", rank=1, options={"residual": "fold", "iterations": 4}))
    part = resolved.method.build(pack(TOY.float(), "nf4"), resolved.settings, torch.Generator(), None)
    factors = part.decompose(Weight(part.base.dense(), lambda: TOY.float(), toy_quantiser, torch.Generator()))
    expected = min(found, key=lambda pair: pair[0])[1].float()
    torch.testing.assert_close(factors["lora_B0"] @ factors["lora_A0"], expected, rtol=1e-3, atol=1e-4)


# The two forms.


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacked_and_folded_residual_are_the_same_function(method: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stacked = moved(on(matrix, method=method, alpha=6.0))
    folded = moved(on(matrix, method=method, alpha=6.0, options={"residual": "fold"}))
    x, other = (torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    y, again = stacked(x), folded(other)
    torch.testing.assert_close(y, again, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    again.backward(g)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    for name in ("lora_A", "lora_B"):
        grad, also = stacked.get_parameter(name).grad, folded.get_parameter(name).grad
        torch.testing.assert_close(grad, also, rtol=1e-4, atol=1e-5)
    expected = stacked.merged(matrix)
    torch.testing.assert_close(folded.merged(folded.base.dense()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.merged_onto_original(matrix), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stacked.merged_onto_original(matrix), expected, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_the_low_rank_form_is_the_change_of_the_original_matrix(method: str, residual: str) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    part = moved(on(matrix, method=method, options={"residual": residual}))
    a, b = part.low_rank_form()
    assert a.shape == (6, 8) and b.shape == (12, 6)
    torch.testing.assert_close(matrix + b @ a, part.merged_onto_original(matrix).detach())


@each
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_starts_as_its_base_to_the_last_bit(method: str, compute: torch.dtype) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    resolved = resolve(SubspaceConfig(method=method, rank=3, alpha=5.0))
    part = resolved.method.build(pack(matrix, "nf4"), resolved.settings, torch.Generator(), None)
    part.compute_dtype = compute
    settled(part)
    assert part.lora_A0.dtype == part.lora_B0.dtype == compute
    for dtype in (compute, torch.float32):
        x = torch.randn(6, 8).to(dtype)
        assert torch.equal(part(x), part.base(x))
    part.to(compute)  # an engine's own cast of every parameter
    x = torch.randn(6, 8).to(compute)
    assert torch.equal(part(x), part.base(x))


@each
def test_a_folded_quantised_layer_starts_off_by_the_residuals_rounding_alone(method: str) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    part = on(matrix, "nf4", original=True, method=method, options={"residual": "fold"})
    held = part.base.dense()
    product = part.scale * part.lora_B @ part.lora_A
    assert not torch.allclose(held, pack(matrix, "nf4").dense()), "the base was not folded"
    torch.testing.assert_close(held, part.base.repacked(matrix - product.detach()).dense())
    torch.testing.assert_close(part.merged_onto_original(matrix), matrix)
    x = torch.randn(5, 8)
    before = part(x)
    part.enabled = False
    assert torch.equal(part(x), before), "disabled, it is not what it was before the first step"


@each
def test_a_disabled_folded_layer_computes_what_the_model_did(method: str) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    part = moved(on(matrix, method=method, options={"residual": "fold"}))
    part.enabled = False
    x = torch.randn(5, 8, requires_grad=True)
    y = part(x)
    torch.testing.assert_close(y, x @ matrix.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], matrix.sum(0).expand(5, 8), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_what_a_file_keeps_sets_a_fresh_layer_up_again(method: str, residual: str) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    config: dict[str, Any] = {"method": method, "options": {"residual": residual}}
    part = moved(on(matrix, "nf4", original=True, **config))
    resolved = resolve(SubspaceConfig(rank=3, **config))
    fresh = resolved.method.build(pack(matrix, "nf4"), resolved.settings, torch.Generator(), None)
    kept = part.factor_tensors()
    assert set(kept) == set(fresh.kept_factors)
    if fresh.rebases:
        fresh.base = fresh.base.repacked(fresh.rebased(kept, opened(fresh, matrix)))
    fresh.set_factors(kept)
    fresh.load_file_tensors(part.file_tensors())
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), part(x))


@each
def test_dropout_is_the_trained_branchs_alone(method: str) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    parts = [
        moved(on(matrix, method=method, dropout=0.5, options={"residual": residual})).train()
        for residual in ("stacked", "fold")
    ]
    x = torch.randn(5, 8)
    outputs = []
    for part in parts:
        torch.manual_seed(4)
        outputs.append(part(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    torch.manual_seed(5)
    assert not torch.allclose(parts[0](x), outputs[0])


def test_a_matrix_that_lacks_rank_is_still_the_identity() -> None:
    thin = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    matrix = thin @ torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    for method in METHODS:
        part = on(matrix, method=method, rank=4)
        x = torch.randn(5, 8, requires_grad=True)
        y = part(x)
        assert torch.equal(y, part.base(x))
        y.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in part.trainables().values())


# What is refused.


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_rounds_without_anything_to_quantise_are_refused(method: str) -> None:
    with pytest.raises(UsageError, match=r"subspace.options.iterations is 5, but a stacked residual"):
        resolve(SubspaceConfig(method=method, options={"iterations": 5}))


def test_a_fold_needs_the_original_of_a_quantised_weight() -> None:
    for method in METHODS:
        resolved = resolve(SubspaceConfig(method=method, rank=3, options={"residual": "fold"}))
        part = resolved.method.build(pack(torch.randn(12, 8), "nf4"), resolved.settings, torch.Generator(), None)
        weight = Weight(part.base.dense(), no_original, lambda m: m, torch.Generator())
        with pytest.raises(UsageError, match="need the checkpoint's own matrices"):
            part.decompose(weight)


@each
def test_mpc_n_is_refused_and_the_penalties_come_with_a_notice(method: str) -> None:
    with pytest.raises(UsageError, match=r"mpc_n.*identity"):
        resolve(SubspaceConfig(method=method, constraint="mpc_n"))
    for kind in ("mpc_o", "mpc_d"):
        info = resolve(SubspaceConfig(method=method, constraint=kind)).info
        assert "spectrum" in info.notices[kind]


@each
def test_alpha_is_the_rank_where_it_is_not_given(method: str) -> None:
    assert resolve(SubspaceConfig(method=method, rank=6)).settings.alpha == 6.0
