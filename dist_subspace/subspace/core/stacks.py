"""A method on the stack of a mixture's experts: every expert has parameters of its own.

    y = W'_e(x)   for the tokens x of each expert e

The parameters of all experts lie in one tensor each, `(experts, ...)`: what is gathered, saved and stepped is a few large tensors
whatever the number of experts. What is computed with one expert is the method's own, on that expert's operator and slices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.experts import stacks_of
from dist_subspace.families.names import ends_with
from dist_subspace.module_places import parameters_of, with_tensors
from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.operator import Stack
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import method_class, methods
from dist_subspace.subspace.core.spec import Settings

UNNAMED = "experts that are held as one stack are trained where they are named; accepted: subspace.target_parameters"


class StackedPart(SubspacePart):
    """The parts of a method on all experts of a stack, as one. `forward` takes rows in the order of their experts, and how many
    each has; an expert without tokens has a gradient of zeros."""

    def __init__(self, base: Stack, method: type[SubspacePart], settings: Settings, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.settings, self.enabled = base, settings, True
        self.info = method.info  # type: ignore[misc]
        parts = [method.build(base.operator(number), settings, generator) for number in range(base.experts)]
        for name in parts[0].trainables():
            drawn = [part.trainables()[name].data for part in parts]
            self.register_parameter(name, nn.Parameter(torch.stack(drawn)))
        one = with_tensors(parts[0], dict.fromkeys(parameters_of(parts[0])))
        assert isinstance(one, SubspaceLinear)  # see check_stacked
        self.one = (one,)  # in a tuple, because an attribute that is a module would be a part

    @property
    def experts(self) -> int:
        return self.base.experts

    def expert(self, number: int) -> SubspaceLinear:
        """The part of one expert, whose parameters are slices of the whole ones as they are now."""
        own = {name: nn.Parameter(p.data[number]) for name, p in self.trainables().items()}
        return self._part(number, own)

    def _part(self, number: int, tensors: Mapping[str, Tensor]) -> SubspaceLinear:
        part = with_tensors(self.one[0], {**parameters_of(self.one[0]), **tensors})
        part.base, part.training = self.base.operator(number), self.training
        return part

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if not self.enabled:
            return self.base(x, counts)
        # One backward for the slices of a tensor, and not one of its whole size for each.
        slices = {name: p.unbind() for name, p in self.trainables().items()}

        def changed(operator: Any, rows: Tensor) -> Tensor:
            part = self._part(operator.number, {name: pieces[operator.number] for name, pieces in slices.items()})
            part.base = operator  # which may have the products of all experts at once
            return part.transformed(rows)

        return self.base(x, counts, changed)

    def merged(self, number: int, weight: Tensor) -> Tensor:
        """An expert's `W'` from its dense `W`, both float32 `(d_out, d_in)`; parameters are whole."""
        return self.expert(number).merged(weight)

    def file_tensors(self) -> dict[str, Tensor]:
        """Each of the method's tensors for all experts, `(experts, ...)`."""
        made = [self.expert(number).file_tensors() for number in range(self.experts)]
        return {suffix: torch.stack([tensors[suffix] for tensors in made]) for suffix in made[0]}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for number in range(self.experts):
            self.expert(number).load_file_tensors({suffix: tensor[number] for suffix, tensor in tensors.items()})

    def extra_repr(self) -> str:
        return f"method={self.info.name}, experts={self.experts}"


def check_stacked(method: type[SubspacePart], settings: Settings) -> None:
    """Refuse (UsageError) a method, or settings of one, that cannot be had on a stack of experts."""
    if not method.info.on_experts:
        able = ", ".join(name for name in methods() if method_class(name).info.on_experts)
        raise UsageError(
            f"subspace.target_parameters names experts, on which method {method.info.name} cannot be put; accepted: a method of "
            f"{able}, or no target_parameters"
        )
    for what, given in (
        ("subspace.constraint", settings.constraint is not None),
        ("subspace.options.init loftq", settings.options.get("init") == "loftq"),
        ("subspace.options.scale_bias", bool(settings.options.get("scale_bias"))),
    ):
        if given:
            raise UsageError(f"{what} cannot be had on experts (subspace.target_parameters); accepted: without it")


def choose_stacks(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The stacks that `subspace.target_parameters` names, by name, in the model's order.

    Raises:
        UsageError: an entry that names no stack.
    """
    stacks = {name: module for name, module in model.named_modules() if _is_stack(module)}
    for ending in targets:
        if not any(ends_with(name, ending) for name in stacks):
            held = [*stacks, *unnamed_stacks(model, stacks)]
            here = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in held)) or "none"
            raise UsageError(
                f"subspace.target_parameters has {ending!r}, which names no stack of experts; those of this model end in: {here}"
            )
    return {name: module for name, module in stacks.items() if any(ends_with(name, ending) for ending in targets)}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, Stack)


def unnamed_stacks(model: nn.Module, named: Collection[str]) -> dict[str, str]:
    """The stacks of experts that nothing names, packed or not, and why a default leaves them out."""
    return {
        full_name: UNNAMED
        for name, module in model.named_modules()
        if (stacks := stacks_of(module)) is not None
        for full_name in (f"{name}.{attribute}" for attribute in stacks.names)
        if full_name not in named
    }
