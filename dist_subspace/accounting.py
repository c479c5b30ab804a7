"""What is trained and what is frozen, in parameters and in bytes on this rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_subspace.placement.tensors import full_numel, full_shape, kept_bytes
from dist_subspace.storage import FrozenLinear, FrozenStack
from dist_subspace.subspace import SubspaceLinear, attachment

_INNER = ("base", "original", "trained")  # parts of a wrapped layer, counted with it


@dataclass(frozen=True)
class Row:
    """One kind of module (layers of the same ending): how many, parameters trained, weights frozen, bytes on this rank."""

    name: str
    modules: int
    trainable: int
    frozen: int
    bytes_on_rank: int


@dataclass(frozen=True)
class Summary:
    """Counts are of weights (a packed 4-bit weight counts as one), bytes are what this rank keeps between steps."""

    method: str | None
    rows: tuple[Row, ...]
    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    hint: str | None = None

    @property
    def share(self) -> float:
        """Trainable weights over all weights."""
        return self.trainable / max(1, self.trainable + self.frozen)

    def __str__(self) -> str:
        lines = [f"{'module':<28}{'layers':>7}{'trainable':>14}{'frozen':>18}{'bytes on this rank':>20}"]
        lines += [
            f"{r.name:<28}{r.modules:>7}{r.trainable:>14,}{r.frozen:>18,}{r.bytes_on_rank:>20,}" for r in self.rows
        ]
        lines.append(
            f"method {self.method or 'none'}: {self.trainable:,} trainable of {self.trainable + self.frozen:,} "
            f"({100 * self.share:.3f} %); on this rank {self.trainable_bytes:,} bytes trainable, {self.frozen_bytes:,} frozen"
        )
        return "\n".join([*lines, *filter(None, [self.hint])])


def summary(model: nn.Module) -> Summary:
    """Trainable and frozen counts and bytes, by kind of module and in all; local (no collective)."""
    seen: set[int] = set()
    kinds: dict[str, list[tuple[int, int, int, int]]] = {}
    layers: Counter[str] = Counter()
    for name, module in model.named_modules():
        counts = _own_counts(module, seen)
        if counts[0] or counts[1]:
            kinds.setdefault(_kind(name), []).append(counts)
            layers[_kind(name)] += name.rpartition(".")[2] not in _INNER
    rows = []
    for kind, entries in kinds.items():
        trainable, frozen, small, large = (sum(column) for column in zip(*entries, strict=True))
        rows.append(Row(kind, max(1, layers[kind]), trainable, frozen, small + large))
    parameters = list({id(p): p for p in model.parameters()}.values())
    attached = attachment(model)
    return Summary(
        method=attached.info.name if attached else None,
        rows=tuple(rows),
        trainable=sum(r.trainable for r in rows),
        frozen=sum(r.frozen for r in rows),
        trainable_bytes=sum(kept_bytes(p) for p in parameters if p.requires_grad),
        frozen_bytes=sum(kept_bytes(p) for p in parameters if not p.requires_grad),
        hint=None if attached is None else _hint(model, attached.layers),
    )


def _hint(model: nn.Module, layers: Iterable[str]) -> str | None:
    """What would make frozen factors that outnumber the weights that they come from fewer."""
    parts: list[Any] = [model.get_submodule(name) for name in layers]
    if not all(isinstance(part, SubspaceLinear) and part.settings.options.get("top_k", 0) is None for part in parts):
        return None
    weights = sum(part.in_features * part.out_features for part in parts)
    return f"all singular vectors of {weights:,} weights are kept; subspace.options.top_k keeps the largest alone"


def trainable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The trained parameters' whole shapes by name, split or not."""
    return {name: full_shape(p) for name, p in model.named_parameters() if p.requires_grad}


def _own_counts(module: nn.Module, seen: set[int]) -> tuple[int, int, int, int]:
    """(trainable, frozen, trainable bytes, frozen bytes) of a module's own parameters, shared ones once."""
    trainable = frozen = trainable_bytes = frozen_bytes = 0
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if parameter.requires_grad:
            trainable += full_numel(parameter)
            trainable_bytes += kept_bytes(parameter)
        else:
            operator = module if isinstance(module, FrozenLinear | FrozenStack) else None
            frozen += full_numel(parameter) if operator is None else operator.weights_in(name)
            frozen_bytes += kept_bytes(parameter)
    return trainable, frozen, trainable_bytes, frozen_bytes


def _kind(name: str) -> str:
    """The last component of a name that is no number and not the wrapped operator of a method's layer."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    if len(parts) > 1 and parts[-1] in _INNER:
        parts = parts[:-1]
    return parts[-1] if parts else "model"
