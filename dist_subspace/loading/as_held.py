"""Weights that a file holds quantised, in a load: which become operators byte for byte, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_subspace.loading.held_weight import AsHeld, HeldBytes, HeldWeight
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.joined_bytes import JoinedBytes, joined
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.own_parts import Check, Look, OwnParts
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.storage import FrozenLinear, PieceWise, is_linear, storage_info


@dataclass
class Place:
    """Where the tensors of an operator are made: in this rank's own parts, or whole (own: None)."""

    own: OwnParts | None
    reader: RangeReader
    device: torch.device

    def tensors(self, as_held: AsHeld, pieces: PieceWise, look: Look | None) -> dict[str, nn.Parameter]:
        """As `OwnParts.copied`."""
        if self.own is not None:
            return self.own.copied(as_held, pieces, look)
        if look is not None:
            layout, check, end = look
            for _, values in self.reader.entries(layout, 0, layout.numel, 1):
                check(values)
            end()
        made = {}
        for name, spec in {**pieces.tensors, **pieces.late}.items():
            tensor = torch.empty(spec.numel, dtype=spec.dtype)
            for first, values in self.reader.entries(HeldBytes(spec.numel, as_held.tensors[name]), 0, spec.numel, 1):
                tensor[first : first + values.numel()] = values
            made[name] = nn.Parameter(tensor.to(self.device).view(spec.shape), requires_grad=False)
        return made


class Quantised:
    """What a storage does with the weights of a checkpoint that are quantised already."""

    def __init__(self, index: CheckpointIndex, storage: str, options: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.index, self.storage, self.options, self.dtype = index, storage, options, dtype
        self.weights: dict[str, HeldWeight] = {
            key: weight for key in index for weight in [index.held(key)] if weight is not None
        }
        self.kept: dict[str, AsHeld] = {}  # what operators and stacks were made of
        held = {key: weight.as_held(storage) for key, weight in self.weights.items()}
        self.taken: dict[str, AsHeld] = {key: how for key, how in held.items() if how is not None}

    def leaves(self, keys: Collection[str]) -> bool:
        """Whether a weight of these keys is one that the maker of the file left in floats beside others that are held as the
        storage holds them: it stays so."""
        return bool(self.taken) and not any(key in self.weights for key in keys)

    def left(self, model: nn.Module, keys_of: Callable[[str], Collection[str]]) -> dict[str, str]:
        """The linear layers of which `leaves` says so, and why they stay in floats."""
        named = [name for name, module in model.named_modules() if is_linear(module)]
        keys = {name: keys_of(f"{name}.weight") for name in named}
        reason = f"the file holds it so, beside others in {self.storage}"
        return {name: reason for name in named if keys[name] and self.leaves(keys[name])}

    def operator(
        self, key: str, shape: tuple[int, int], place: Place, watch: Check, end: Callable[[], None], **rest: Any
    ) -> FrozenLinear:
        """The operator, of logical shape `(d_out, d_in)`, around the bytes of a weight that is taken as it is.

        Arguments:
            watch: is shown the numbers that the bytes stand for where the type of the computation may not hold them; end: is
                called after the last.
            rest: what `PieceWise.operator` takes besides.
        """
        in_pieces, as_held = storage_info(self.storage).in_pieces, self.taken[key]
        assert in_pieces is not None  # a storage that takes bytes says what it holds
        pieces = in_pieces(shape, False, **as_held.options)
        look = (self.index.layout(key), watch, end) if self.dtype == torch.float16 else None
        operator = pieces.operator(place.tensors(as_held, pieces, look), **rest)
        operator.set_plain_values(as_held.plain)
        self.kept[key] = as_held
        return operator

    def stack(self, layout: Layout, transposed: bool) -> JoinedBytes | None:
        """How the storage takes the bytes of a stack of experts `(experts, d_out, d_in)`; None where they are packed anew.

        Arguments:
            transposed: whether the model holds `(experts, d_in, d_out)`.
        """
        in_pieces, shape = storage_info(self.storage).in_pieces, (layout.shape[1], layout.shape[2])
        # Numbers that float16 may not hold are looked at while they are packed.
        if self.dtype == torch.float16 or not self.weights or in_pieces is None:
            return None
        found = joined(layout, self.index.held, self.storage, lambda options: in_pieces(shape, transposed, **options))
        if found is not None:
            self.kept.update(dict.fromkeys(layout.keys, found.as_held))
        return found

    def notes(self, alone: Collection[str]) -> list[str]:
        """What becomes of the quantised weights, one sentence for each format.

        Arguments:
            alone: keys that are parameters by themselves, and not joined to others or split.
        """
        groups: dict[tuple[str, bool | None, bool | None, str | None], list[str]] = {}
        for key, weight in self.weights.items():
            has, kept = self._double(self.taken.get(key)), self._double(self.kept.get(key))
            better = weight.storage if key in alone else None
            groups.setdefault((weight.kind, has, kept, better), []).append(key)
        return [self._note(kind, has, kept, better, keys) for (kind, has, kept, better), keys in groups.items()]

    def _double(self, how: AsHeld | None) -> bool | None:
        """Whether statistics are quantised too in bytes that are taken so; None for none."""
        return None if how is None else bool(how.options.get("double_quant", self.options.get("double_quant", False)))

    def _note(self, kind: str, has: bool | None, kept: bool | None, better: str | None, keys: list[str]) -> str:
        """has, kept: `_double` of the file's bytes, and of those that were made of them."""
        held = f"{self.index.folder} holds {keys[0]}{f' and {len(keys) - 1} more' if keys[1:] else ''} in {kind}"
        if kept is not None:
            taken = f"{held}, and so does {self.storage}"
            if has and not kept:
                return (
                    f"{taken}: their codes are kept as they are, and their quantised statistics are held as the float32 numbers "
                    "that they stand for, because several weights of the file become one"
                )
            return f"{taken}: their bytes are kept as they are{self._other_options(kept)}"
        instead = f"; model.storage {better} keeps them as they are" if better else ""
        name = str(self.dtype).removeprefix("torch.")
        if storage_info(self.storage).dtype is None:
            once = instead or "; of the 16-bit model they would be rounded once"
            return f"{held}, which become {name} numbers and are quantised again as {self.storage}: rounded twice{once}"
        small = sum(self.weights[key].nbytes for key in keys)
        large = sum(self.weights[key].numel for key in keys) * self.dtype.itemsize
        return f"{held}, which become {name} numbers, in {_size(large)} instead of {_size(small)}{instead}"

    def _other_options(self, kept: bool) -> str:
        """Where the file's bytes are not those that the storage's options ask for."""
        asked = self.options.get("double_quant", kept)
        if kept == asked:
            return ""
        have = "are" if kept else "are not"
        return f", and their statistics {have} quantised too, although model.double_quant is {str(asked).lower()}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
