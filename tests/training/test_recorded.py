"""What happens to logits behind a head is recorded and done again to any rows; what cannot be, is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.training.recorded import Program, Recorder, close

SCALE = nn.Parameter(torch.tensor(0.5))


def recorded(function: Callable[[Tensor], Tensor]) -> tuple[Program | None, str | None]:
    result = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Recorder() as recorder:
        recorder.begin(result)
        logits = function(result)
    return recorder.program(logits), recorder.unknown


def capped(x: Tensor) -> Tensor:
    return torch.tanh(x / 3.0) * 3.0


def twice_used(x: Tensor) -> Tensor:
    y = x * 2
    return y + x.float()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x.float(),
        lambda x: x * 0.25,
        lambda x: 0.25 * x,
        lambda x: x / torch.tensor(3.0).item(),
        lambda x: torch.clamp(x, -1.0, 1.0).contiguous(),
        lambda x: x.to(torch.float64) if x.shape[-1] == 5 else x,
        lambda x: (torch.ones(3) + 1, capped(x))[1],
        capped,
        twice_used,
    ],
)
def test_what_treats_each_entry_by_itself_is_done_again(function: Callable[[Tensor], Tensor]) -> None:
    program, unknown = recorded(function)
    assert program is not None and unknown is None
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(program(rows), function(rows))


def masked(x: Tensor) -> Tensor:
    x[:, :, 2] = -1.0
    return x


def masked_aside(x: Tensor) -> Tensor:
    y = x * 1.0
    y[..., 2] = -1.0
    return y


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x * SCALE, "mul"),
        (lambda x: x + torch.ones(5), "add"),
        (lambda x: torch.log_softmax(x, -1), "log_softmax"),
        (lambda x: x[..., :4], "__getitem__"),
        (lambda x: x.view(2, 5), "view"),
        (lambda x: x.mul_(2), "mul_"),
        (lambda x: torch.cat([x, x], -1), "cat"),
        (masked, "__setitem__"),
        (masked_aside, "__setitem__"),
    ],
)
def test_what_one_rows_logits_do_not_say_is_known_by_name(function: Callable[[Tensor], Tensor], name: str) -> None:
    program, unknown = recorded(function)
    assert program is None and unknown is not None and name in unknown


def test_logits_that_are_made_of_something_else_have_no_program() -> None:
    assert recorded(lambda x: torch.zeros(1, 2, 5)) == (None, None)


def test_a_head_that_is_called_twice_has_no_program() -> None:
    with Recorder() as recorder:
        recorder.begin(torch.ones(2))
        result = torch.ones(2)
        recorder.begin(result)
    assert recorder.program(result) is None and recorder.unknown is not None


def test_rounding_is_told_from_another_result() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 10
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        exact = logits.to(dtype)
        assert close((logits * (1 + rounding)).to(dtype), exact)
        assert not close((logits * 1.1).to(dtype), exact) and not close(exact[:, :-1], exact)
        shut = exact.clone()
        shut[:, 3] = float("-inf")
        assert not close(exact, shut) and close(shut, shut.clone())
