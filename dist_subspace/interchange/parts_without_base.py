"""An adapter's parts without its base model: on layers that have a shape and no weight. Local."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.subspace import KeepsFactors, StackedPart, SubspacePart, largest_rank_of, resolve, shared_of
from dist_subspace.subspace.attach import settings_of


class ShapeOfLinear(nn.Module):
    """The shape of a frozen linear layer. It has no weight to apply."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # on the device where parts are made

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("the shape of a layer has no weight")

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise TypeError("the shape of a layer has no weight")


class ShapeOfStack(nn.Module):
    """The shape of a stack of experts. It has no weights to apply."""

    storage = "none"

    def __init__(self, experts: int, d_out: int, d_in: int) -> None:
        super().__init__()
        self.experts, self.expert_shape = experts, (d_out, d_in)

    def forward(self, x: Tensor, counts: Sequence[int], each: object = None) -> Tensor:
        raise TypeError("the shape of a stack has no weights")

    def operator(self, number: int) -> ShapeOfLinear:
        return ShapeOfLinear(*self.expert_shape)


def parts_without_base(adapter: AdapterFolder) -> Iterator[tuple[str, SubspacePart]]:
    """The adapter's parts on linear layers and on stacks of experts, one after the other, with their trained values and frozen
    factors; on the CPU.

    An adapter of PEFT, or one written before shapes were kept, gives none.

    Raises:
        UsageError: for an unknown method, or tensors that are not the method's.
    """
    shapes, stacks = (adapter.ours.get(kind) or {} for kind in ("shapes", "stacks"))
    if not shapes and not stacks:
        return
    resolved = resolve(adapter.config)
    linear: dict[str, nn.Module] = {layer: ShapeOfLinear(*shape) for layer, shape in shapes.items()}
    of_experts = {layer: ShapeOfStack(*shape) for layer, shape in stacks.items()}
    sites = {**linear, **of_experts}
    settings = settings_of(
        sites, resolved, {name: largest_rank_of(resolved.method, site) for name, site in sites.items()}
    )
    shared = shared_of(resolved.method, linear, next(iter(settings.values())))
    for layer, site in sites.items():
        generator = torch.Generator().manual_seed(0)
        if layer in of_experts:
            part: SubspacePart = StackedPart(of_experts[layer], resolved.method, settings[layer], generator)
        else:
            part = resolved.method.build(site, settings[layer], generator, shared)
        with torch.no_grad():
            if isinstance(part, KeepsFactors) and part.kept_factors:
                part.set_factors(adapter.factors(layer))
            _fill(part, layer, adapter)
        yield layer, part


def _fill(part: SubspacePart, layer: str, adapter: AdapterFolder) -> None:
    wanted = {suffix: file_key(layer, suffix) for suffix in part.file_tensors()}
    missing = [key for key in wanted.values() if key not in adapter.keys]
    if missing:
        raise UsageError(f"{adapter.path} is an adapter of method {part.info.name}, but its file lacks {missing[0]}")
    part.load_file_tensors({suffix: adapter.tensor(key) for suffix, key in wanted.items()})
