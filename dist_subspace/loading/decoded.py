"""A checkpoint with quantised weights, seen as the one without: a weight is one tensor of floats under its own key.

Whoever plans a load sees names, shapes and types of plain weights, and so transformers' own renaming, joining and splitting
work on them; whoever reads gets their values, which are decoded as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dist_subspace.loading.formats import find_weights
from dist_subspace.loading.held_weight import HeldWeight
from dist_subspace.loading.index import PIECE, CheckpointIndex
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.loading.transformers_internals import key_plan
from dist_subspace.storage import is_conv1d

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True, kw_only=True)
class DecodedIndex(CheckpointIndex):
    """files: of a weight, where its codes lie. shapes: as the model holds it. types: what it is decoded into. spans: of a weight,
    its bytes in the file alone have a meaning."""

    raw: CheckpointIndex
    weights: Mapping[str, HeldWeight]
    kind: torch.dtype

    @property
    def in_file(self) -> CheckpointIndex:
        return self.raw

    def held(self, key: str) -> HeldWeight | None:
        return self.weights.get(key)

    def read(self, key: str) -> Tensor:
        return self.decode(key, self.kind) if key in self.weights else super().read(key)

    def decode(self, key: str, dtype: torch.dtype) -> Tensor:
        """A quantised weight as the model holds it, in a type of floats."""
        layout = self.layout(key)
        whole = torch.empty(layout.numel, dtype=dtype)
        with RangeReader(self) as reader:
            reader.fill(layout, 0, layout.numel, whole)
        return whole.view(layout.shape)

    def layout(self, key: str) -> Layout:
        weight = self.weights.get(key)
        if weight is None:
            return super().layout(key)
        layout = Layout.of(key, weight.shape)
        return layout.transpose(-2, -1) if weight.turned else layout

    def same(self, one: str, other: str, dtype: torch.dtype, part: tuple[int, int] = (0, 1)) -> bool:
        if (one, other, dtype) in self.compared or not {one, other} & self.weights.keys():
            return super().same(one, other, dtype, part)
        layouts = self.layout(one), self.layout(other)
        if layouts[0].shape != layouts[1].shape:
            return False
        numel, (number, count) = layouts[0].numel, part
        last = numel * (number + 1) // count
        with RangeReader(self) as reader:
            for first in range(numel * number // count, last, PIECE):
                end = min(first + PIECE, last)
                values = [torch.empty(end - first, dtype=reader.dtype(layout)) for layout in layouts]
                for layout, held in zip(layouts, values, strict=True):
                    reader.fill(layout, first, end, held)
                if not torch.equal(values[0].to(dtype), values[1].to(dtype)):
                    return False
        return True


def decoded_index(
    index: CheckpointIndex, settings: Mapping[str, Any] | None, model: PreTrainedModel, dtype: torch.dtype
) -> CheckpointIndex:
    """The checkpoint as the model reads it.

    Arguments:
        settings: the `quantization_config` of config.json; None where it has none.
        model: the empty model.
        dtype: of the computation; weights are decoded into it, or into float32 where it is float16, which may not hold them.

    Raises:
        UsageError: tensors of a format that are missing, or of another type or shape than the format's.
    """
    if settings is None:
        return index
    with RangeReader(index) as reader:
        found = find_weights(index, settings, reader.bytes)
    weights = _as_the_model_holds(found.weights, model)
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    hidden = found.dropped | {part.key for weight in weights.values() for part in weight.parts}
    left = [key for key in index if key not in hidden]

    def seen(of_file: Mapping[str, Any], of_weights: Mapping[str, Any]) -> dict[str, Any]:
        return {key: of_file[key] for key in left} | dict(of_weights)

    return DecodedIndex(
        folder=index.folder,
        files=seen(index.files, {key: index.files[w.parts[0].key] for key, w in weights.items()}),
        shapes=seen(index.shapes, {key: w.model_shape for key, w in weights.items()}),
        types=seen(index.types, dict.fromkeys(weights, _NAMES[kind])),
        spans=seen(index.spans, {key: (0, w.nbytes) for key, w in weights.items()}),
        notes=(*index.notes, *found.notes),
        bytes_read=index.bytes_read,
        raw=index,
        weights=weights,
        kind=kind,
    )


def _as_the_model_holds(weights: Mapping[str, HeldWeight], model: PreTrainedModel) -> dict[str, HeldWeight]:
    """Quantisers take the matrix of a Conv1D as `(d_out, d_in)`; the layer holds it the other way round."""
    modules = dict(model.named_modules())
    conv1d = {f"{name}.weight" for name, module in modules.items() if is_conv1d(module)}
    if not conv1d:
        return dict(weights)
    plan = key_plan(model, weights)
    turned = {key for name, keys in plan.direct.items() if name in conv1d for key in keys}
    return {key: replace(weight, turned=True) if key in turned else weight for key, weight in weights.items()}
