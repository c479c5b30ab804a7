"""A method on the stack of a mixture's experts: every expert has parameters of its own.

    y = W'_e(x)   for the tokens x of each expert e

The parameters of all experts lie in one tensor each, `(experts, ...)`: what is gathered, saved and stepped is a few large tensors
whatever the number of experts. What is computed with one expert is the method's own, on that expert's operator and slices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.experts import stacks_of
from dist_subspace.families.names import ends_with
from dist_subspace.module_places import buffers_of, parameters_of, with_tensors
from dist_subspace.subspace.core.linear import SubspaceLinear
from dist_subspace.subspace.core.operator import Stack, Weights
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import method_class, methods
from dist_subspace.subspace.core.spec import OWN, SHARED, Settings
from dist_subspace.subspace.core.statistic import Decomposes, FoldsIntoBase, KeepsFactors, SetupStatistic, rebases

UNNAMED = "experts that are held as one stack are trained where they are named; accepted: subspace.target_parameters"


class StackedPart(FoldsIntoBase):
    """The parts of a method on all experts of a stack, as one. `forward` takes rows in the order of their experts, and how many
    each has; an expert without tokens has a gradient of zeros.

    shared: whether the experts have one set of parameters among them, which has no first dimension of experts then.
    """

    def __init__(self, base: Stack, method: type[SubspacePart], settings: Settings, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.settings, self.enabled = base, settings, True
        self.info = method.info  # type: ignore[misc]
        self.shared = settings.expert_parameters == SHARED
        built = 1 if self.shared else base.experts
        parts = [method.build(base.operator(number), settings, generator) for number in range(built)]
        for name in parts[0].trainables():
            drawn = [part.trainables()[name].data for part in parts]
            self.register_parameter(name, nn.Parameter(drawn[0] if self.shared else torch.stack(drawn)))
        self._keep_buffers(parts)
        one = with_tensors(parts[0], dict.fromkeys(parameters_of(parts[0])))
        assert isinstance(one, SubspaceLinear)  # see check_stacked
        self.one = (one,)  # in a tuple, because an attribute that is a module would be a part
        self.kept_factors = one.kept_factors if isinstance(one, KeepsFactors) else ()

    def _keep_buffers(self, parts: Sequence[nn.Module]) -> None:
        """Those of the experts' parts, one behind the other."""
        for name in buffers_of(parts[0]):
            self.register_buffer(name, torch.stack([part.get_buffer(name) for part in parts]), persistent=False)

    @property
    def experts(self) -> int:
        return int(self.base.experts)

    def expert(self, number: int) -> SubspaceLinear:
        """The part of one expert, whose parameters are slices of the whole ones as they are now."""
        own = {n: nn.Parameter(p.data if self.shared else p.data[number]) for n, p in self.trainables().items()}
        return self._part(number, own)

    def _part(self, number: int, tensors: Mapping[str, Tensor]) -> SubspaceLinear:
        own = {name: buffer[number] for name, buffer in self.named_buffers(recurse=False)}
        part = with_tensors(self.one[0], {**parameters_of(self.one[0]), **tensors}, own)
        part.base, part.training = self.base.operator(number), self.training
        part.compute_dtype, part.name = self.compute_dtype, self.name
        if isinstance(part, KeepsFactors):
            part.stacked = (self, number)
        return part

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if not self.enabled and not self.rebases:
            return self.base(x, counts)  # type: ignore[no-any-return]
        # One backward for the slices of a tensor, and not one of its whole size for each.
        slices = {name: None if self.shared else p.unbind() for name, p in self.trainables().items()}

        def changed(operator: Any, rows: Tensor) -> Tensor:
            number = operator.number
            part = self._part(number, {n: self.get_parameter(n) if p is None else p[number] for n, p in slices.items()})
            part.base = operator  # which may have the products of all experts at once
            return part.transformed(rows) if self.enabled else part.untransformed(rows)

        return self.base(x, counts, changed)  # type: ignore[no-any-return]

    def merged(self, number: int, weight: Tensor) -> Tensor:
        """An expert's `W'` from its dense `W`, both float32 `(d_out, d_in)`; parameters are whole."""
        return self.expert(number).merged(weight)

    # The statistic of a stack: each expert's, one behind the other.

    @property
    def setup_statistic(self) -> str:
        one = self.one[0]
        return one.setup_statistic if isinstance(one, SetupStatistic) else "none"

    @property
    def rebases(self) -> bool:
        return rebases(self.one[0])

    def decompose(self, weight: Weights) -> dict[str, Tensor]:  # type: ignore[override]
        """As `Decomposes`, from each expert's weight; every tensor is `(experts, ...)`."""
        made = [self._decomposing(number).decompose(weight[number]) for number in range(self.experts)]
        return {name: torch.stack([factors[name] for factors in made]) for name in made[0]}

    def rebased(self, factors: Mapping[str, Tensor], weight: Weights) -> Iterator[Tensor]:  # type: ignore[override]
        """Each expert's matrix, one after the other."""
        for number in range(self.experts):
            part = self._decomposing(number)
            assert isinstance(part, FoldsIntoBase)
            yield part.rebased({name: factor[number] for name, factor in factors.items()}, weight[number])

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        parts = [self._decomposing(number) for number in range(self.experts)]
        for number, part in enumerate(parts):
            part.set_factors({name: factor[number] for name, factor in factors.items()})
        for name, parameter in parameters_of(parts[0]).items():
            if parameter is not None and not parameter.requires_grad:
                frozen = torch.stack([part.get_parameter(name).data for part in parts])
                setattr(self, name, nn.Parameter(frozen, requires_grad=False))
        self._keep_buffers(parts)

    def _decomposing(self, number: int) -> Decomposes:
        part = self.expert(number)
        assert isinstance(part, Decomposes)
        return part

    # The file.

    def file_tensors(self) -> dict[str, Tensor]:
        """Each of the method's tensors for all experts, `(experts, ...)`; those that they share as they are."""
        if self.shared:
            return self.expert(0).file_tensors()
        made = [self.expert(number).file_tensors() for number in range(self.experts)]
        return {suffix: torch.stack([tensors[suffix] for tensors in made]) for suffix in made[0]}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.shared:
            self.expert(0).load_file_tensors(tensors)
            return
        for number in range(self.experts):
            self.expert(number).load_file_tensors({suffix: tensor[number] for suffix, tensor in tensors.items()})

    def extra_repr(self) -> str:
        return f"method={self.info.name}, experts={self.experts}{', shared parameters' if self.shared else ''}"


def check_stacked(method: type[SubspacePart], settings: Settings) -> None:
    """Refuse (UsageError) a method, or settings of one, that cannot be had on a stack of experts."""
    if not method.info.on_experts:
        raise UsageError(
            f"subspace.target_parameters names experts, on which method {method.info.name} cannot be put; accepted: a method of "
            f"{_able(OWN)}, or no target_parameters"
        )
    if settings.expert_parameters not in method.info.on_experts:
        raise UsageError(
            f"subspace.expert_parameters is {settings.expert_parameters!r}, but each expert's parameters of method "
            f"{method.info.name} start at its own matrix; accepted: {OWN}, or a method of {_able(SHARED)}"
        )
    for what, given in (
        ("subspace.constraint", settings.constraint is not None),
        ("subspace.options.init loftq", settings.options.get("init") == "loftq"),
        ("subspace.options.scale_bias", bool(settings.options.get("scale_bias"))),
    ):
        if given:
            raise UsageError(f"{what} cannot be had on experts (subspace.target_parameters); accepted: without it")


def _able(parameters: str) -> str:
    return ", ".join(name for name in methods() if parameters in method_class(name).info.on_experts)


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
