"""An adapter's parts without its base model: on layers that have a shape and no weight. Local."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.tensor_names import file_key
from dist_subspace.subspace import KeepsFactors, SubspacePart, largest_rank_of, resolve, shared_of
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


def parts_without_base(adapter: AdapterFolder) -> Iterator[tuple[str, SubspacePart]]:
    """The adapter's parts on linear layers, one after the other, with their trained values and frozen factors; on the CPU.

    An adapter of PEFT, or one written before shapes were kept, gives none.

    Raises:
        UsageError: for an unknown method, or tensors that are not the method's.
    """
    shapes = adapter.ours.get("shapes") or {}
    if not shapes:
        return
    resolved = resolve(adapter.config)
    sites: dict[str, nn.Module] = {layer: ShapeOfLinear(*shape) for layer, shape in shapes.items()}
    settings = settings_of(
        sites, resolved, {name: largest_rank_of(resolved.method, site) for name, site in sites.items()}
    )
    shared = shared_of(resolved.method, sites, next(iter(settings.values())))
    for layer, site in sites.items():
        part = resolved.method.build(site, settings[layer], torch.Generator().manual_seed(0), shared)
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
