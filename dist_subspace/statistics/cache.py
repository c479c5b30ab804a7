"""Results of decompositions as files, one a layer, named by what they were made from. Rank 0 alone reads and writes.

If the process dies while one is written, the file never gets its name. A file's name is a function of the weight's bytes, the
method and its settings: it is right for whoever finds it, whatever run or number of ranks made it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_subspace.atomic_files import PARTIAL, make_folder, storage_error, sync
from dist_subspace.storage import FrozenStack
from dist_subspace.subspace import SetupStatistic

FORMAT = 1
_IRRELEVANT = ("lr_ratio", "power", "reduction", "activation")  # options that no statistic depends on


def key_of(name: str, part: SetupStatistic, checksum: int, seed: int) -> str:
    """The file's name (hex) for one layer."""
    settings = part.settings
    options = {k: v for k, v in settings.options.items() if k not in _IRRELEVANT}
    d_out, d_in = part.base.expert_shape if isinstance(part.base, FrozenStack) else part.base.shape
    made_from: list[Any] = [FORMAT, name, checksum, d_in, d_out, seed]
    made_from += [part.info.name, settings.rank, settings.alpha, options]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:32]


class FactorCache:
    """A folder of factor files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a whole file is there; a damaged one counts as none, and is made again."""
        try:
            with safe_open(self.path(key), framework="pt", device="cpu") as handle:
                return bool(handle.keys())
        except (OSError, SafetensorError):
            return False

    def read(self, key: str) -> dict[str, Tensor]:
        """Copies: one small tensor that a layer keeps would else keep the whole mapped file in this process's memory."""
        with safe_open(self.path(key), framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118

    def write(self, key: str, name: str, factors: dict[str, Tensor]) -> None:
        """The file appears by one rename after its bytes are on disk.

        Raises:
            StorageError: the disk is full or refuses. Nothing half-written is left.
        """
        partial = self.folder / f".{key}.{PARTIAL}"
        try:
            make_folder(self.folder)
            # One entry: safetensors writes several in any order, and equal contents shall be equal bytes.
            save_file({k: t.contiguous() for k, t in factors.items()}, partial, metadata={"layer": name})
            partial.chmod(0o644)
            sync(partial)
            os.replace(partial, self.path(key))
            sync(self.folder)  # checkpoints name the file, and are worth nothing without it
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise storage_error(self.path(key), error) from error

    def digest(self, key: str) -> str:
        """sha256 of a file, in hex."""
        with self.path(key).open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
