"""Stacks of experts: each expert is held and multiplied with as a linear layer of its own, one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, FrozenStack, pack, pack_stack, storage_info, storages
from dist_subspace.storage.stack import hit

EXPERTS, D_OUT, D_IN = 5, 22, 13  # no whole number of blocks of 64
COUNTS = (3, 0, 1, 4, 0)

each_storage = pytest.mark.parametrize("storage", sorted(storages()))
each_layout = pytest.mark.parametrize("transposed", [False, True])


def stack_of(storage: str, transposed: bool = False, **options: bool) -> tuple[FrozenStack, Tensor]:
    shape = (EXPERTS, D_IN, D_OUT) if transposed else (EXPERTS, D_OUT, D_IN)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pack_stack(weights, storage, transposed=transposed, **options), weights


def dense(stack: FrozenStack) -> Tensor:
    return torch.stack([stack.expert(number).dense() for number in range(stack.experts)])


@each_storage
@each_layout
def test_each_expert_is_held_as_a_linear_layer_of_its_own(storage: str, transposed: bool) -> None:
    for options in ({}, {"double_quant": True}):
        stack, weights = stack_of(storage, transposed, **options)
        assert stack.storage == storage and stack.experts == EXPERTS and stack.expert_shape == (D_OUT, D_IN)
        for number in range(EXPERTS):
            alone = pack(weights[number], storage, transposed=transposed, **options)
            of_stack = stack.expert(number)
            own, expected = dict(of_stack.named_parameters()), dict(alone.named_parameters())
            assert own.keys() == expected.keys() and of_stack.plain_values() == alone.plain_values()
            assert all(torch.equal(own[name], expected[name]) for name in own)
            assert torch.equal(of_stack.dense(), alone.dense())


@each_storage
def test_a_stack_takes_the_bytes_of_its_experts(storage: str) -> None:
    stack, _ = stack_of(storage)
    held = sum(p.numel() * p.element_size() for p in stack.parameters())
    info = storage_info(storage)
    assert held == EXPERTS * info.bytes_held(
        D_OUT, D_IN, **info.checked({"double_quant": False} if info.options else {})
    )
    assert sum(stack.weights_in(name) for name, _ in stack.named_parameters()) == EXPERTS * D_OUT * D_IN


@each_storage
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_and_gradient_are_those_of_each_experts_matrix(
    storage: str, transposed: bool, dtype: torch.dtype
) -> None:
    stack, _ = stack_of(storage, transposed)
    matrices, rows = dense(stack), sum(COUNTS) + 2
    x = torch.randn(rows, D_IN, dtype=dtype, requires_grad=True)
    y = stack(x, COUNTS)
    g = torch.randn(y.shape, dtype=dtype)
    y.backward(g)
    expected, gradient = torch.zeros(rows, D_OUT), torch.zeros(rows, D_IN)
    for number, own in hit(COUNTS):
        expected[own], gradient[own] = x.detach()[own].float() @ matrices[number].t(), g[own].float() @ matrices[number]
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert y.dtype == dtype and x.grad is not None
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=bound * float(expected.abs().max()))
    torch.testing.assert_close(x.grad.float(), gradient, rtol=0, atol=bound * float(gradient.abs().max()))
    assert not y[sum(COUNTS) :].any(), "rows of no expert are zeros"


@each_storage
def test_what_is_computed_with_an_experts_operator_is_differentiable(storage: str) -> None:
    stack, _ = stack_of(storage)
    x = torch.randn(sum(COUNTS), D_IN, requires_grad=True)
    twice = stack(x, COUNTS, each=lambda operator, rows: 2 * operator(rows))
    torch.testing.assert_close(twice, 2 * stack(x, COUNTS))
    (gradient,) = torch.autograd.grad(twice.sum(), x)
    (expected,) = torch.autograd.grad(2 * stack(x, COUNTS).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("by_operator", [False, True])
def test_backward_reads_the_experts_again_and_keeps_nothing_of_them(by_operator: bool) -> None:
    stack, _ = stack_of("nf4")
    x = torch.randn(sum(COUNTS), D_IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = stack(x, COUNTS, each=(lambda operator, rows: operator(rows)) if by_operator else None)
    kept = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    assert not [t for t in saved if t.untyped_storage().data_ptr() in kept]
    other, _ = stack_of("nf4")
    with torch.no_grad():
        for parameter, value in zip(stack.parameters(), other.parameters(), strict=True):
            parameter.data = value.flip(0).clone()  # a sharding engine's other gather
    y.sum().backward()
    expected = torch.cat([dense(stack)[n].sum(dim=0).expand(rows.stop - rows.start, -1) for n, rows in hit(COUNTS)])
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_one_matrix_is_decoded_at_a_time_and_only_of_experts_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, _ = stack_of("nf4")
    asked: list[int] = []
    expert = FrozenStack.expert
    monkeypatch.setattr(FrozenStack, "expert", lambda self, number: asked.append(number) or expert(self, number))
    y = stack(torch.randn(sum(COUNTS), D_IN, requires_grad=True), COUNTS)
    y.sum().backward()
    assert asked == [0, 2, 3] * 2


def test_who_reads_a_stack_as_a_tensor_is_told() -> None:
    stack, _ = stack_of("int8")
    with pytest.raises(UsageError, match="reads a stack of experts that is held as int8"):
        stack[0]


def test_a_stack_is_no_linear_operator_and_its_experts_are_no_modules_of_it() -> None:
    stack, _ = stack_of("nf4")
    assert not isinstance(stack, FrozenLinear) and [name for name, _ in stack.named_modules()] == [""]
    assert isinstance(stack.expert(0), nn.Module)


def test_a_float_stack_is_the_parameter_that_was_given() -> None:
    weights = nn.Parameter(torch.randn(3, 4, 5))
    stack = pack_stack(weights, "fp32")
    assert next(stack.parameters()) is weights and stack.is_float


@each_storage
@each_layout
def test_other_matrices_are_packed_as_a_stack_of_them_is(storage: str, transposed: bool) -> None:
    for options in ({}, {"double_quant": True}):
        stack, _ = stack_of(storage, transposed, **options)
        other = torch.randn(EXPERTS, D_OUT, D_IN, generator=torch.Generator().manual_seed(5))
        laid_out = other.transpose(1, 2).contiguous() if transposed else other
        made = stack.repacked(iter(other))
        right = pack_stack(laid_out, storage, transposed=transposed, **options)
        own, expected = dict(made.named_parameters()), dict(right.named_parameters())
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
        for name, parameter in own.items():
            stack.get_parameter(name).data.copy_(parameter)
        stack.set_plain_values(made.plain_values())
        assert torch.equal(dense(stack), dense(right)) and stack.plain_values() == right.plain_values()
