"""A module takes the place of another wherever that one stands, with the hooks that others have set on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.module_places import move_hooks, replace_everywhere


class Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 100


def test_a_layer_that_several_modules_hold_is_replaced_in_all_of_them_and_kept_inside_the_new_one() -> None:
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"one": nn.ModuleList([shared, other]), "two": nn.ModuleDict({"inner": shared})})
    wrapped = Wrapped(shared)
    replace_everywhere(model, {shared: wrapped})
    assert model["one"][0] is wrapped and model["two"]["inner"] is wrapped  # type: ignore[index]
    assert model["one"][1] is other and wrapped.base is shared  # type: ignore[index]


def test_hooks_run_around_the_new_module_and_are_removed_by_their_own_handles() -> None:
    seen: list[str] = []
    base = nn.Linear(2, 2)
    handles = [
        base.register_forward_pre_hook(lambda module, args: seen.append("before")),
        base.register_forward_hook(lambda module, args, output: output * 2),
        base.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward")),
    ]
    wrapped = Wrapped(base)
    x = torch.ones(1, 2, requires_grad=True)
    plain = torch.nn.functional.linear(x, base.weight, base.bias)
    move_hooks(base, wrapped)
    found = wrapped(x)
    torch.testing.assert_close(found, 2 * (plain + 100))
    found.sum().backward()
    assert seen == ["before", "backward"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(wrapped(x), plain + 100)
    assert seen == ["before", "backward"]


def test_a_module_without_hooks_leaves_the_others_alone() -> None:
    other = nn.Linear(2, 2)
    other.register_forward_hook(lambda module, args, output: output * 0)
    move_hooks(nn.Linear(2, 2), other)
    assert not other(torch.ones(1, 2)).any()
