"""The one reader of adapter folders: each file is opened once, and tensors are read when they are asked for. Local."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.interchange.base_model import find_base
from dist_subspace.interchange.description import (
    CONFIG,
    OWN,
    OWN_CONFIG,
    WEIGHTS,
    own_entries,
    read_description,
)
from dist_subspace.interchange.loaded_adapter import LoadedAdapter
from dist_subspace.interchange.tensor_names import FACTOR, current_key, factor_key
from dist_subspace.interchange.tokenizer_files import tokenizer_of
from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder
from dist_subspace.run_folder.manifest import read_manifest
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.core.peft_words import PREFIX


class AdapterFolder:
    """The files of an adapter, ours or PEFT's, and the factors that a checkpoint names beside it.

    described: what its configuration says; ours: the entries of this package, empty for an adapter that PEFT wrote; layers: the
    names of its parts; keys: of the tensors, as this version spells them, in the file's order; bytes: of the tensors file.

    Arguments:
        verify: a checkpoint's files are compared with its manifest, and factors with the hash that the checkpoint knows. Such
            a file is read twice: once for its hash.

    Raises:
        UsageError: for a folder without an adapter, an adapter of an unknown format, or a file that is cut short or changed.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.path, self._verify = Path(folder), verify
        if not has_adapter(self.path):
            raise UsageError(f"{str(folder)!r} holds no adapter; looked for {CONFIG} and {WEIGHTS}")
        if verify:
            _refuse_changed(self.path)
        self.described: dict[str, Any] = read_description(self.path)
        self.ours: dict[str, Any] = own_entries(self.path, self.described) if OWN in self.described else {}
        self.layers: list[str] = self.ours.get("layers") or []
        with _reading(self.path / WEIGHTS):
            self._file = safe_open(self.path / WEIGHTS, framework="pt", device="cpu")
            self._stored = {current_key(key): key for key in self._file.keys()}  # noqa: SIM118
            self.bytes = (self.path / WEIGHTS).stat().st_size
        self.keys: list[str] = list(self._stored)

    @property
    def config(self) -> SubspaceConfig:
        """Raises UsageError for an adapter that PEFT wrote: import reads it."""
        return SubspaceConfig.of_dict(own_entries(self.path, self.described))

    def find_base(self, fingerprint: Callable[[Path], str]) -> str:
        """The base model that the adapter names, on this machine (`base_model.find_base`)."""
        return find_base(self.path, self.described, fingerprint)

    def tokenizer(self) -> Any:
        """Its tokenizer, new tokens included, or a folder that holds one; None where neither is to be had."""
        return tokenizer_of(self.path)

    def tensor(self, key: str) -> Tensor:
        with _reading(self.path / WEIGHTS):
            tensor: Tensor = self._file.get_tensor(self._stored[key])
        return tensor

    def tensors(self, *, factors: bool = True) -> dict[str, Tensor]:
        """All tensors of the file, by this version's keys.

        Arguments:
            factors: the frozen factors that lie in it too.

        Raises:
            UsageError: a value is no number.
        """
        tensors = {key: self.tensor(key) for key in self.keys if factors or f".{FACTOR}" not in key}
        check_finite(self.path, tensors)
        return tensors

    def shape(self, key: str) -> list[int]:
        return list(self._file.get_slice(self._stored[key]).get_shape())

    def suffixes(self, layer: str) -> dict[str, str]:
        """The keys of a layer's trained tensors, frozen factors apart, by suffix."""
        start = f"{PREFIX}{layer}."
        of_layer = {key.removeprefix(start): key for key in self.keys if key.startswith(start)}
        return {suffix: key for suffix, key in of_layer.items() if not suffix.startswith(FACTOR)}

    def factors(self, layer: str) -> dict[str, Tensor]:
        """A layer's frozen factors, from the file or, for a run's checkpoint, from the run's folder."""
        start = factor_key(layer, "")
        in_file = {key.removeprefix(start): self.tensor(key) for key in self.keys if key.startswith(start)}
        entry = self._kept_apart.get(layer)
        return in_file if entry is None else in_file | self._read_apart(entry)

    @property
    def _kept_apart(self) -> Mapping[str, Mapping[str, str]]:
        """The factors that a run's checkpoint names, by layer: they lie once in the run's folder."""
        return self.ours.get("factors") or {}

    def _read_apart(self, entry: Mapping[str, str]) -> dict[str, Tensor]:
        file, folder = _factor_file(self.path, entry), str(self.path)
        if not file.exists():
            raise UsageError(f"{folder!r} is a checkpoint whose factors are in {file}, and there is no such file")
        if self._verify and _sha256(file) != entry["sha256"]:
            raise UsageError(
                f"{file} is not the file that {folder!r} was trained with (sha256 {entry['sha256'][:12]}): put it back"
            )
        with _reading(file), safe_open(file, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118

    def without_tensors(self) -> LoadedAdapter:
        """An adapter of ours as what is compared with a model; its tensors may be many."""
        return LoadedAdapter(
            self.config,
            {},
            self.described,
            shapes=self.ours.get("shapes") or {},  # of an import not both sides may be known
            copies=self.ours.get("base_copies") or {},
            layers=tuple(self.layers),
        )

    def whole(self) -> LoadedAdapter:
        """An adapter of ours with all its tensors."""
        return replace(self.without_tensors(), tensors=self.all_tensors())

    def all_tensors(self) -> dict[str, Tensor]:
        """Trained tensors and frozen factors, wherever they lie, by this version's keys."""
        apart = {layer: self._read_apart(entry) for layer, entry in self._kept_apart.items()}
        return self.tensors() | {
            factor_key(layer, name): t for layer, held in apart.items() for name, t in held.items()
        }


def read_adapter(folder: str | Path) -> LoadedAdapter:
    """A folder that `save_adapter` wrote, or a run's checkpoint, with all tensors; a changed checkpoint is refused."""
    return AdapterFolder(folder, verify=True).whole()


def has_adapter(folder: Path) -> bool:
    """Whether the two files of an adapter are there, whoever wrote them."""
    return (folder / CONFIG).exists() and (folder / WEIGHTS).exists()


def check_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UsageError for a value that is no number."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(
                f"{str(folder)!r} holds values that are NaN or infinite, the first in {key}: its training diverged, or the file "
                "is damaged; accepted: an earlier checkpoint of it, or a new copy"
            )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What fails in the block, as one sentence (UsageError)."""
    try:
        yield
    except SafetensorError as error:
        raise UsageError(
            f"{str(file.parent)!r} holds no whole adapter because {file.name} is no whole safetensors file ({error}); copy it "
            "again"
        ) from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error})") from error


def _refuse_changed(folder: Path) -> None:
    """Raises UsageError for a checkpoint whose manifest knows another adapter than the one that is there. Adapters apart from
    a checkpoint have no manifest: they are their owner's to change."""
    manifest = CheckpointFolder(folder).manifest
    with suppress(FileNotFoundError):
        try:
            listed = read_manifest(folder)
            changed = [
                name
                for name in (CONFIG, OWN_CONFIG, WEIGHTS)
                if name in listed and listed[name]["sha256"] != _sha256(folder / name)
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{manifest} cannot be read ({error}); accepted: another checkpoint") from error
        if changed:
            raise UsageError(
                f"{folder / changed[0]} does not have the sha256 that {manifest.name} says; accepted: another checkpoint"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _factor_file(folder: Path, entry: Mapping[str, str]) -> Path:
    """Where a checkpoint's factors lie: beside it, or beside the folder that it was set aside in."""
    near, far = (RunFolder(home).factors / entry["file"] for home in folder.resolve().parents[:2])
    return far if far.exists() and not near.exists() else near
