"""A model with a subspace method as the plain model it stands for: every parameter of that model, and how each is made.

The modules are walked once, before anything is gathered or written: what cannot be merged is refused here. Local, alike on
every rank; only an entry's `make` touches weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.loading.original import original_of, original_stack
from dist_subspace.module_places import parameters_of, saved_buffers_of
from dist_subspace.placement.tensors import full_shape
from dist_subspace.storage import FrozenLinear, FrozenStack, Origin
from dist_subspace.subspace import (
    AddsBias,
    FoldsIntoBase,
    MergesIntoNorm,
    MethodInfo,
    NewTokens,
    Settings,
    StackedPart,
    SubspaceLinear,
    TrainedBeside,
    attached,
    rebases,
)
from dist_subspace.subspace.beside.trained_copy import TrainedLinear

BASES = ("dequantised", "original")


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of the plain model.

    shape: as a checkpoint holds it. needs: the parameters that must be whole for it. make: on the rank that writes: the
    tensor, in the type that is at hand. identity: equal for tied parameters. added: the plain architecture has no such
    parameter (a bias that the method brought).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs: tuple[nn.Parameter, ...]
    make: Callable[[], Tensor]
    identity: tuple[object, ...]
    added: bool = False
    as_one: bool = (
        False  # a stack of experts that its checkpoint holds as one tensor, whatever its family's files usually hold
    )


@dataclass
class Drift:
    """Which frozen matrix is merged into, and how far the forward's own (Ŵ) is from the checkpoint's (W), by layer."""

    base: str
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)  # ‖Ŵ - W‖ and ‖W‖
    unknown: list[str] = field(default_factory=list)  # quantised layers without an original

    def merged(self, name: str, operator: FrozenLinear, part: SubspaceLinear | None) -> Tensor:
        """The merged matrix on the chosen base, float32 `(d_out, d_in)`. The two are compared where the weight is quantised."""
        known = operator.origin is not None or operator.is_float
        merged, distance, norm = self._onto_base(operator, part, (lambda: original_of(operator)) if known else None)
        if not known:
            self.unknown.append(name)
        elif not operator.is_float:
            self.distances[name] = (distance, norm)
        return merged

    def merged_stack(self, name: str, stack: FrozenStack, part: StackedPart | None) -> Tensor:
        """A stack of experts on the chosen base, float32 on the CPU, in its checkpoint's layout; made expert by expert."""
        originals = original_stack(stack) if stack.origin is not None else None
        d_out, d_in = stack.expert_shape
        made = torch.empty((stack.experts, d_in, d_out) if stack.transposed else (stack.experts, d_out, d_in))
        distances, norms = torch.zeros(2, stack.experts).unbind()
        for number in range(stack.experts):
            own = None if originals is None else originals[number].float
            expert = None if part is None else part.expert(number)
            onto, distances[number], norms[number] = self._onto_base(stack.expert(number), expert, own)
            made[number] = onto.t() if stack.transposed else onto
        if originals is None and not stack.is_float:
            self.unknown.append(name)
        elif not stack.is_float:
            self.distances[name] = (float(distances.norm()), float(norms.norm()))
        return made

    def _onto_base(
        self, operator: FrozenLinear, part: SubspaceLinear | None, original: Callable[[], Tensor] | None
    ) -> tuple[Tensor, float, float]:
        """The merged matrix on the chosen base, and `‖Ŵ - W‖` and `‖W‖`: zeros where the two need not, or cannot, be compared.

        Arguments:
            original: gives the checkpoint's own, float32 `(d_out, d_in)`; None where it is not to be had.
        """
        onto_held = _unchanged if part is None else part.merged
        onto_original = part.merged_onto_original if isinstance(part, FoldsIntoBase) else onto_held
        if original is not None and operator.is_float and self.base == "original":
            return onto_original(original()), 0.0, 0.0
        held = operator.dense(torch.float32)
        if original is None or operator.is_float:
            return onto_held(held), 0.0, 0.0
        own = original().to(held.device)
        norm = float(own.norm())
        if rebases(part):  # its bytes hold a residual: only what is merged can be compared
            held, own = onto_held(held), onto_original(own)
            onto_held = onto_original = _unchanged
        distance = float(torch.dist(held, own))
        return onto_original(own) if self.base == "original" else onto_held(held), distance, norm

    def by_layer(self) -> dict[str, float]:
        """`‖Ŵ - W‖ / ‖W‖` (Frobenius)."""
        return {name: distance / max(norm, 1e-30) for name, (distance, norm) in self.distances.items()}

    def overall(self) -> float | None:
        """The same over all layers as one; None where nothing could be compared."""
        if not self.distances:
            return None
        distances, norms = zip(*self.distances.values(), strict=True)
        return float(torch.tensor(distances).norm() / torch.tensor(norms).norm().clamp(min=1e-30))


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def refuse_unmergeable(info: MethodInfo, settings: Settings) -> None:
    """Raises UsageError for a method whose trained part is no change of the weights."""
    instead = "accepted for it: save_adapter, and load_adapter on the base"
    if not info.mergeable:
        raise UsageError(
            f"method {info.name} cannot be merged: no change of the frozen weights computes what it does; {instead}"
        )
    if settings.constraint is not None and settings.constraint.nonlinear:
        raise UsageError(
            f"method {info.name} with constraint mpc_n cannot be merged: with an activation between its factors the update "
            f"is no matrix; {instead}"
        )


def plain_entries(model: nn.Module, drift: Drift, dtype: torch.dtype) -> list[Entry]:
    """The plain model's parameters and persistent buffers in the model's order, tied ones under each name (`each_once`).

    Arguments:
        drift: says which frozen matrix is taken; filled while entries are made.
        dtype: of every floating parameter of the plain model.

    Raises:
        UsageError: for a method that cannot be merged, and for an original that is not to be had.
    """
    attachment = attached(model)
    refuse_unmergeable(attachment.info, attachment.settings)
    if drift.base not in BASES:
        raise unknown_name("base", drift.base, BASES)
    if drift.base == "original":
        _refuse_without_original(model)
    tokens = attachment.new_tokens
    walked = _walk("", model, drift)
    return [_typed(entry if tokens is None else _enlarged(entry, tokens), dtype) for entry in walked]


def each_once(entries: Sequence[Entry], pairs: Mapping[str, str]) -> list[Entry]:
    """Tied parameters once, under their first name; where some of those that a reader would tie are different now, all of them.

    Arguments:
        pairs: parameter -> the one that the plain model's class ties it to, if a checkpoint holds only one of them.
    """
    identities = {entry.name: entry.identity for entry in entries}
    groups: dict[str, set[str]] = {}
    for target, source in pairs.items():
        joined = groups.get(target, {target}) | groups.get(source, {source})
        groups |= dict.fromkeys(joined, joined)
    apart = {name for name, group in groups.items() if len({identities[n] for n in group if n in identities}) > 1}
    first: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        first.setdefault((*entry.identity, entry.name) if entry.name in apart else entry.identity, entry)
    return list(first.values())


def _enlarged(entry: Entry, tokens: NewTokens) -> Entry:
    """With the rows of new tokens, where it is a table that has a row for each token."""
    if entry.name not in tokens.tables:
        return entry
    return replace(
        entry,
        shape=tokens.enlarged_shape(entry.name, entry.shape),
        needs=(*entry.needs, *tokens.parameters_for(entry.name)),
        make=lambda: tokens.enlarged(entry.name, entry.make()),
    )


def _typed(entry: Entry, dtype: torch.dtype) -> Entry:
    return replace(entry, dtype=dtype) if entry.dtype.is_floating_point else entry


def _refuse_without_original(model: nn.Module) -> None:
    for name, module in model.named_modules():
        held = isinstance(module, FrozenLinear) or (isinstance(module, FrozenStack) and not module.is_float)
        if held and module.origin is None:
            raise UsageError(
                f"base is 'original', but {name.removesuffix('.base')} was not read from a checkpoint by load_frozen; "
                "accepted here: dequantised"
            )


def _walk(name: str, module: nn.Module, drift: Drift) -> Iterator[Entry]:
    if isinstance(module, TrainedBeside):
        instead = module.plain_module()
        yield from () if instead is None else _walk(name, instead, drift)
    elif isinstance(module, SubspaceLinear):
        yield from _linear(name, module, drift)
    elif isinstance(module, MergesIntoNorm):
        yield from _wrapped(name, module)
    elif isinstance(module, StackedPart):
        yield _stack(name, module.base, drift, module)  # type: ignore[arg-type]
    elif isinstance(module, FrozenStack):
        yield _stack(name, module, drift, None)
    elif isinstance(module, FrozenLinear):
        yield _matrix(name, module, None, drift)
        if module.bias is not None:
            yield _as_it_is(f"{name}.bias", module.bias)
    else:
        yield from _plain(name, module)
        for child, inner in module.named_children():
            yield from _walk(f"{name}.{child}" if name else child, inner, drift)


def _plain(name: str, module: nn.Module) -> Iterator[Entry]:
    """A module's own parameters, and the buffers that a checkpoint holds."""
    held: dict[str, Tensor] = {name: p for name, p in parameters_of(module).items() if p is not None}
    for key, tensor in (held | saved_buffers_of(module)).items():
        turned = key == "weight" and isinstance(module, TrainedLinear) and module.conv1d
        yield _as_it_is(f"{name}.{key}" if name else key, tensor, turned)


def _as_it_is(name: str, tensor: Tensor, turned: bool = False) -> Entry:
    """A tensor that is written as it is, or transposed."""
    needs = (tensor,) if isinstance(tensor, nn.Parameter) else ()
    shape = full_shape(tensor)[::-1] if turned else full_shape(tensor)
    return Entry(
        name, shape, tensor.dtype, needs, lambda: tensor.data.t() if turned else tensor.data, (id(tensor), None)
    )


def _linear(name: str, part: SubspaceLinear, drift: Drift) -> Iterator[Entry]:
    base: FrozenLinear = part.base  # type: ignore[assignment]
    yield _matrix(name, base, part, drift)
    if part.bias is None and not isinstance(part, AddsBias):
        return
    inside = {id(p) for p in base.parameters()}
    needs = tuple(p for p in part.parameters() if id(p) not in inside)

    def bias() -> Tensor:
        merged = part.merged_bias(None if part.bias is None else part.bias.detach().float())
        assert merged is not None  # one of the two is there
        return merged

    identity = ("bias", id(part))
    yield Entry(f"{name}.bias", (part.out_features,), torch.float32, needs, bias, identity, part.bias is None)


def _matrix(name: str, base: FrozenLinear, part: SubspaceLinear | None, drift: Drift) -> Entry:
    """A linear layer's weight, in the layout that the layer had. Tied layers hold the same tensor, whatever its name."""
    held = tuple(p for p in base.parameters() if p is not base.bias)
    trained = () if part is None else tuple(p for p in part.parameters() if p is not part.bias)
    shape = base.shape[::-1] if base.conv1d else base.shape

    def make() -> Tensor:
        if part is None and base.is_float and drift.base == "dequantised":
            return held[0].data  # as it is held: an output layer may be larger than any block
        weight = drift.merged(name, base, part)
        return weight.t() if base.conv1d else weight

    identity = (id(held[0]), None if part is None else id(part))
    return Entry(f"{name}.weight", tuple(shape), torch.float32, tuple(dict.fromkeys((*held, *trained))), make, identity)


def _stack(name: str, stack: FrozenStack, drift: Drift, part: StackedPart | None) -> Entry:
    """The experts of a layer, under the name that the plain model's parameter has."""
    held = tuple(stack.parameters())
    d_out, d_in = stack.expert_shape
    shape = (stack.experts, d_in, d_out) if stack.transposed else (stack.experts, d_out, d_in)
    own = () if part is None else tuple(part.parameters())

    def make() -> Tensor:
        if part is None and stack.is_float:
            return held[0].data
        return drift.merged_stack(name, stack, part)

    needs = tuple(dict.fromkeys((*held, *own)))
    identity, as_one = (id(held[0]), None if part is None else id(part)), type(stack.origin) is Origin
    return Entry(name, shape, torch.float32, needs, make, identity, as_one=as_one)


def _wrapped(name: str, part: MergesIntoNorm) -> Iterator[Entry]:
    """A part that stands in the place of a module with a weight and a bias (a norm)."""
    base = part.base
    trained = tuple(part.parameters(recurse=False))
    weight: nn.Parameter = base.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = getattr(base, "bias", None)
    shape = full_shape(weight)
    yield Entry(
        f"{name}.weight",
        shape,
        weight.dtype,
        (weight, *trained),
        lambda: part.merged(weight.detach().float()),
        (id(part),),
    )
    if bias is None:
        return

    def merged_bias() -> Tensor:
        merged = part.merged_bias(bias.detach().float())
        assert merged is not None  # as the frozen one is there
        return merged

    yield Entry(f"{name}.bias", full_shape(bias), bias.dtype, (bias, *trained), merged_bias, ("bias", id(part)))
