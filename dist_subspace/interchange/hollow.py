"""An adapter without its base: its folder read a tensor at a time, and its parts on layers that have a shape and no weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import FACTOR, WEIGHTS, current_key, factor_file, file_key
from dist_subspace.interchange.description import CONFIG, OWN, own_entries, read_description
from dist_subspace.interchange.peft.files import Imported
from dist_subspace.subspace import KeepsFactors, SubspaceConfig, SubspacePart, largest_rank_of, resolve, shared_of
from dist_subspace.subspace.attach import settings_of
from dist_subspace.subspace.core.peft_words import PREFIX


class AdapterFolder:
    """The files of an adapter, and the factors that a checkpoint names beside it.

    described: what its configuration says; ours: the entries of this package, empty for an adapter that PEFT wrote; layers: the
    names of its parts; keys: of the tensors, as this version spells them, in the file's order; bytes: of the tensors file.

    Raises:
        UsageError: for a folder without an adapter, an adapter of an unknown format, or a file that is cut short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        try:
            self.described: dict[str, Any] = read_description(self.path)
            self.file = safe_open(self.path / WEIGHTS, framework="pt", device="cpu")
            self._stored = {current_key(key): key for key in self.file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            missing = next(name for name in (CONFIG, WEIGHTS) if not (self.path / name).exists())
            raise UsageError(f"{self.path} holds no whole adapter: {missing} is missing") from error
        except SafetensorError as error:
            raise UsageError(f"{self.path} holds no whole adapter ({error}); copy it again") from error
        self.keys: list[str] = list(self._stored)
        self.ours: dict[str, Any] = own_entries(self.path, self.described) if OWN in self.described else {}
        self.layers: list[str] = self.ours.get("layers") or []
        self.bytes = (self.path / WEIGHTS).stat().st_size

    def without_tensors(self) -> Imported:
        """An adapter of ours as what is compared with a model; its tensors are read apart (`read_adapter`)."""
        return Imported(
            self.config,
            {},
            self.described,
            shapes=self.ours.get("shapes") or {},  # of an import not both sides may be known
            copies=self.ours.get("base_copies") or {},
            layers=tuple(self.layers),
        )

    @property
    def config(self) -> SubspaceConfig:
        return SubspaceConfig.of_dict(self.ours)

    def tensor(self, key: str) -> Tensor:
        found: Tensor = self.file.get_tensor(self._stored[key])
        return found

    def shape(self, key: str) -> list[int]:
        return list(self.file.get_slice(self._stored[key]).get_shape())

    def suffixes(self, layer: str) -> dict[str, str]:
        """The keys of a layer's own tensors, frozen factors apart, by suffix."""
        start = f"{PREFIX}{layer}."
        own = {key.removeprefix(start): key for key in self.keys if key.startswith(start)}
        return {suffix: key for suffix, key in own.items() if not suffix.startswith(FACTOR)}

    def factors(self, layer: str) -> dict[str, Tensor]:
        """A layer's frozen factors, from the file or, for a run's checkpoint, from the run's folder."""
        start = f"{PREFIX}{layer}.{FACTOR}"
        found = {key.removeprefix(start): self.tensor(key) for key in self.keys if key.startswith(start)}
        entry = (self.ours.get("factors") or {}).get(layer)
        if entry is None:
            return found
        file = factor_file(self.path, entry)
        if not file.exists():
            raise UsageError(f"{self.path} is a checkpoint whose factors are in {file}, and there is no such file")
        with safe_open(file, framework="pt", device="cpu") as handle:
            return found | {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


class HollowLinear(nn.Module):
    """The shape of a frozen linear layer. It has no weight to apply."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # on the device where parts are made

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("a hollow layer has no weight")

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise TypeError("a hollow layer has no weight")


def hollow_parts(adapter: AdapterFolder) -> Iterator[tuple[str, SubspacePart]]:
    """The adapter's parts on linear layers, one after the other, with their trained values and frozen factors; on the CPU.

    An adapter of PEFT, or one written before shapes were kept, gives none.

    Raises:
        UsageError: for an unknown method, or tensors that are not the method's.
    """
    shapes = adapter.ours.get("shapes") or {}
    if not shapes:
        return
    resolved = resolve(adapter.config)
    sites: dict[str, nn.Module] = {layer: HollowLinear(*shape) for layer, shape in shapes.items()}
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
