"""What a checkpoint folder holds: which tensor lies in which safetensors file, checked before anything large is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.errors import UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint: key -> file, and key -> shape."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str) -> Tensor:
        """One tensor, in the checkpoint's own type, on the CPU."""
        with safe_open(self.files[key], framework="pt", device="cpu") as handle:
            return handle.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)


def open_checkpoint(folder: str | Path) -> CheckpointIndex:
    """Read the headers of a model folder's weights.

    Raises:
        UsageError: no such folder, no weights in it, only pickles, an index that names a missing file or tensor, or a file
            that is cut short.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(
            f"model.path is {str(folder)!r}, which is no folder; accepted: a transformers model folder or a hub name"
        )
    listed = _listed(path)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in sorted(set(listed.values())) if listed else _unlisted(path):
        for key, shape in _header(file).items():
            files[key], shapes[key] = file, shape
    for key, file in listed.items():
        if key not in files:
            raise UsageError(f"{path / INDEX} says that {key!r} is in {file.name}, but the file does not hold it")
    return CheckpointIndex(path, files, shapes)


def _listed(path: Path) -> dict[str, Path]:
    """key -> file of an index, or nothing if there is none."""
    index = path / INDEX
    if not index.exists():
        return {}
    try:
        names = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{index} is no checkpoint index ({error!r}); expected JSON with a weight_map") from error
    files = {key: path / name for key, name in names.items()}
    absent = sorted({file.name for file in files.values() if not file.exists()})
    if absent:
        raise UsageError(
            f"{index} names {', '.join(absent[:3])}, which {'are' if len(absent) > 1 else 'is'} not in the folder"
        )
    return files


def _unlisted(path: Path) -> list[Path]:
    if (path / SINGLE).exists():
        return [path / SINGLE]
    found = sorted(path.glob("*.safetensors"))
    if found:
        return found
    pickles = [file.name for pattern in PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        raise UsageError(
            f"model.path is {str(path)!r}, which holds its weights only as pickles ({pickles[0]}), and pickles run code when "
            "read; convert them to safetensors (transformers: save_pretrained) and try again"
        )
    raise UsageError(f"model.path is {str(path)!r}, which holds no weights; looked for {SINGLE} and {INDEX}")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is no whole safetensors file ({error}); copy or download it again") from error
