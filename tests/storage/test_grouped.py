"""Products of several experts in one call: those of each expert alone, and no more matrices decoded at once than is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.storage import AT_ONCE, FrozenStack, grouped, pack_stack, storages
from dist_subspace.storage.stack import hit
from dist_subspace.torch_internals import has_grouped_kernel

EXPERTS = 6
COUNTS = (3, 0, 1, 4, 2, 0)  # four experts have tokens
ROWS = sum(COUNTS) + 2

each_storage = pytest.mark.parametrize("storage", sorted(storages()))
each_layout = pytest.mark.parametrize("transposed", [False, True])
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_shape = pytest.mark.parametrize("shape", [(22, 13), (32, 16)], ids=["odd", "whole 16 bytes"])


class Calls(list[tuple[int, ...]]):
    """The shapes of the matrices of each call, and where these lay."""

    def __init__(self) -> None:
        self.places: list[int] = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """This CPU has a kernel for groups, and who calls it is noted."""
    seen, real = Calls(), grouped.grouped_mm

    def noted(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        seen.append(tuple(matrices.shape))
        seen.places.append(matrices.data_ptr())
        return real(rows, matrices, ends)

    monkeypatch.setattr(grouped, "has_grouped_kernel", lambda device, dtype: True)
    monkeypatch.setattr(grouped, "grouped_mm", noted)
    return seen


def stack_of(storage: str, shape: tuple[int, int], transposed: bool = False) -> FrozenStack:
    weights = torch.randn(EXPERTS, *shape, generator=torch.Generator().manual_seed(0))
    return pack_stack(weights.transpose(1, 2).contiguous() if transposed else weights, storage, transposed=transposed)


def passed(stack: FrozenStack, dtype: torch.dtype, **given: Any) -> tuple[Tensor, Tensor]:
    """The product, and the gradient of x."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, stack.expert_shape[1], generator=generator).to(dtype).requires_grad_()
    y = stack(x, COUNTS, **given)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(dtype))
    return y.detach(), gradient


@each_storage
@each_layout
@each_type
@each_shape
def test_groups_give_what_each_expert_gives_alone(
    storage: str, transposed: bool, dtype: torch.dtype, shape: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    stack = stack_of(storage, shape, transposed)
    stack.at_once = 3
    alone = passed(stack, dtype)
    calls = request.getfixturevalue("calls")
    together = passed(stack, dtype)
    assert calls
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, right in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=bound * float(right.abs().max()))
        assert not ours[sum(COUNTS) :].any(), "rows of no expert are zeros"


@pytest.mark.parametrize("at_once", [1, 3, AT_ONCE])
def test_at_most_so_many_matrices_are_decoded_at_once_and_of_experts_with_tokens_alone(
    at_once: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    expert = FrozenStack.expert
    monkeypatch.setattr(FrozenStack, "expert", lambda self, number: asked.append(number) or expert(self, number))
    stack = stack_of("nf4", (32, 16))
    stack.at_once = at_once
    passed(stack, torch.float32)
    hits = [number for number, _ in hit(COUNTS)]
    assert asked == hits * 2 and max(shape[0] for shape in calls) == min(at_once, len(hits))
    assert sum(shape[0] for shape in calls) == 2 * len(hits)


@each_layout
def test_floats_are_multiplied_with_where_they_lie(transposed: bool, calls: Calls) -> None:
    stack = stack_of("fp32", (32, 16), transposed)
    passed(stack, torch.float32)
    assert set(calls.places) == {next(stack.parameters()).data_ptr()} and len(calls) == 2


def test_a_method_on_every_expert_has_the_products_of_all_in_one_call(calls: Calls) -> None:
    stack = stack_of("nf4", (32, 16))
    y, gradient = passed(stack, torch.float32, each=lambda operator, rows: 2 * operator(rows))
    assert [shape[0] for shape in calls] == [4, 4]
    alone = passed(stack, torch.float32)
    torch.testing.assert_close((y, gradient), (2 * alone[0], 2 * alone[1]))
    calls.clear()
    scaled, _ = passed(stack, torch.float32, each=lambda operator, rows: operator(3 * rows))
    assert not calls, "other rows than its own are an expert's own affair"
    torch.testing.assert_close(scaled, 3 * alone[0])


@pytest.mark.parametrize("storage", ["nf4", "fp32"])
def test_backward_reads_the_experts_again_and_keeps_nothing_of_them(storage: str, calls: Calls) -> None:
    stack, saved = stack_of(storage, (32, 16)), []
    x = torch.randn(ROWS, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = stack(x, COUNTS, each=lambda operator, rows: operator(rows))
    assert not [t for t in saved if t.is_floating_point()]
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.data = parameter.flip(0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for number, rows in hit(COUNTS):
        expected = stack.expert(number).dense().sum(dim=0)
        torch.testing.assert_close(gradient[rows], expected.expand(rows.stop - rows.start, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(22, 13), (32, 16)], ids=["odd", "whole 16 bytes"])
def test_the_gradient_that_comes_in_is_not_written_over(shape: tuple[int, int], calls: Calls) -> None:
    stack = stack_of("int8", shape)
    x = torch.randn(ROWS, shape[1], requires_grad=True)
    g = torch.randn(ROWS, shape[0])
    before = g.clone()
    stack(x, COUNTS).backward(g)
    assert calls and torch.equal(g, before)


def test_a_cpu_multiplies_one_by_one() -> None:
    assert not has_grouped_kernel(torch.device("cpu"), torch.bfloat16)
    assert not grouped.in_groups(torch.zeros(2, 2))
