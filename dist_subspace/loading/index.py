"""What a checkpoint folder holds: which tensor lies in which safetensors file, checked before anything large is read.

Which files count is transformers' rule (`weight_files`), for every reader: another choice would train other weights than those
that everybody else sees under the same name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.loading.held_weight import TYPES, HeldWeight
from dist_subspace.loading.layout import Layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PIECE = 1 << 22  # elements that are compared at a time
# What can be read whole, by safetensors' names.
_ALL_TYPES = TYPES | {
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (16, 32, 64)},
    "C64": torch.complex64,
}
# Two tensors of a checkpoint, and the type in which they are compared.
Pair = tuple[str, str, torch.dtype]


@dataclass
class BytesRead:
    """How many bytes of tensors this process has read."""

    total: int = 0


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint: key -> file, key -> shape, key -> type as safetensors names it ("BF16"), key -> the first
    byte of its values in the file, and how many bytes they are.

    notes: what is worth saying about the folder, one sentence each. bytes_read: counted wherever values are read. compared: what
    is known of `same` already.
    """

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    spans: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    bytes_read: BytesRead = field(default_factory=BytesRead)
    compared: dict[Pair, bool] = field(default_factory=dict)

    @property
    def in_file(self) -> CheckpointIndex:
        """The tensors as the files name them."""
        return self

    def held(self, key: str) -> HeldWeight | None:
        """How the files hold the weight, where they hold it in several tensors."""
        return None

    def layout(self, key: str) -> Layout:
        """Where the entries of a tensor lie, counted in the order of the file."""
        return Layout.of(key, self.shapes[key])

    def read(self, key: str) -> Tensor:
        """One tensor, in the checkpoint's own type, on the CPU.

        Raises:
            UsageError: of a type that is not read, or the file has become shorter, or the system cannot read it.
        """
        kind = _ALL_TYPES.get(self.types[key])
        if kind is None:
            raise UsageError(f"{self.files[key]} holds {key} as {self.types[key]}; accepted: {', '.join(_ALL_TYPES)}")
        tensor = torch.empty(self.shapes[key], dtype=kind)
        self._fill(key, 0, tensor)
        return tensor

    def _fill(self, key: str, start: int, tensor: Tensor) -> None:
        """Read the values of a tensor of the file from byte `start` on."""
        values = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file = self.files[key]
        try:
            with file.open("rb", buffering=0) as handle:
                read_fully(handle.fileno(), self.spans[key][0] + start, values, file, key)
        except OSError as error:
            raise unreadable(file, error) from error
        self.bytes_read.total += len(values)

    def size(self, key: str) -> int:
        """Bytes of a tensor's values."""
        return self.spans[key][1]

    def same(self, one: str, other: str, dtype: torch.dtype, part: tuple[int, int] = (0, 1)) -> bool:
        """Whether two tensors hold the same values in the given type; read a few rows at a time.

        Arguments:
            part: a number and a count: the part of that number of so many alone is compared.
        """
        if (one, other, dtype) in self.compared:
            return self.compared[one, other, dtype]
        shape, (number, count) = self.shapes[one], part
        if shape != self.shapes[other]:
            return False
        if not shape:
            return torch.equal(self.read(one).to(dtype), self.read(other).to(dtype))
        first, last = shape[0] * number // count, shape[0] * (number + 1) // count
        rows = max(1, PIECE // max(1, torch.Size(shape[1:]).numel()))
        ranges = [(start, min(start + rows, last)) for start in range(first, last, rows)]
        return all(torch.equal(self._rows(one, *own).to(dtype), self._rows(other, *own).to(dtype)) for own in ranges)

    def _rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows of a tensor of the file, `[first, last)` of its first dimension."""
        shape = self.shapes[key]
        rows = torch.empty((last - first, *shape[1:]), dtype=_ALL_TYPES[self.types[key]])
        self._fill(key, first * (self.size(key) // max(1, shape[0])), rows)
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)


def read_fully(descriptor: int, place: int, values: memoryview, file: Path, key: str) -> None:
    """Fill `values` with the bytes of a file from `place` on.

    Raises:
        UsageError: it ends before, as one does that was cut after it had been opened. OSError: the system cannot read it.
    """
    done = 0
    while done < len(values):
        count = os.preadv(descriptor, [values[done:]], place + done)
        if count == 0:
            raise UsageError(f"{file} is cut short: it ends within {key}; copy or download it again")
        done += count


def unreadable(file: Path, error: OSError) -> UsageError:
    """What is said of a file that the system cannot read."""
    return UsageError(f"{file} cannot be read ({error.strerror}); copy or download it again")


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
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    spans: dict[str, tuple[int, int]] = {}
    files: dict[str, Path] = {}
    chosen = weight_files(path)
    for file in chosen:
        for key, (shape, dtype, span) in _header(file).items():
            files[key], shapes[key], types[key], spans[key] = file, shape, dtype, span
    if chosen == [path / SINGLE]:
        return CheckpointIndex(path, files, shapes, types, spans, _unread_index(path, files))
    index = _named_by_config(path) or path / INDEX
    if index.name.endswith(".json"):
        for key, file in _files_of_index(index).items():
            if key not in files:
                raise UsageError(f"{index} says that {key!r} is in {file.name}, but the file does not hold it")
    return CheckpointIndex(path, files, shapes, types, spans)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that transformers reads, by name: the one that config.json names (`transformers_weights`),
    else `model.safetensors`, else those of its index. Whatever else lies in the folder is no part of the model.

    Raises:
        UsageError: none of these, or an index that cannot be read or names a file that is not there.
    """
    named = _named_by_config(folder)
    if named is not None and not named.name.endswith(".json"):
        return [named]
    if named is None and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = named or folder / INDEX
    if index.is_file():
        return sorted(set(_files_of_index(index).values()))
    raise UsageError(_no_weights(folder))


def weight_names(folder: Path, listed: Collection[str]) -> list[str]:
    """The files that `weight_files` finds once they are there, for a folder that has the small files of a repository alone.

    Arguments:
        listed: every file that the repository has.
    """
    named = _in_config(folder)
    if named is None and SINGLE in listed:
        return [SINGLE]
    if named is not None and not named.endswith(".json"):
        return [named]
    index = folder / (named or INDEX)
    return sorted(set(_names_of_index(index).values())) if index.is_file() else []


def _in_config(folder: Path) -> str | None:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with config.json is said where it is read
    return None if name is None else str(name)


def _named_by_config(folder: Path) -> Path | None:
    """The weights' file or index that config.json names (`transformers_weights`); None where it names none."""
    name = _in_config(folder)
    if name is None:
        return None
    file = folder / name
    accepted = name.endswith((".safetensors", ".safetensors.index.json"))
    if not _is_inside(folder, file) or not accepted or not file.is_file():
        raise UsageError(
            f"{folder / 'config.json'} says transformers_weights: {name!r}; accepted: a .safetensors file or a "
            ".safetensors.index.json in the folder"
        )
    return file


def _files_of_index(index: Path) -> dict[str, Path]:
    """The file of each key of an index.

    Raises:
        UsageError: for what is no index, and for a file that is not there, or lies elsewhere.
    """
    files = {key: index.parent / name for key, name in _names_of_index(index).items()}
    outside = sorted({str(file) for file in files.values() if not _is_inside(index.parent, file)})
    if outside:
        raise UsageError(f"{index} names {outside[0]}, which is outside the folder; accepted: files of the folder")
    absent = sorted({file for file in files.values() if not file.exists()})
    if absent:
        broken = absent[
            0
        ].is_symlink()  # as a hub's files are, or those of a folder that was copied without what it links to
        where = f" ({absent[0].name} is a link to {os.readlink(absent[0])}, where nothing is)" if broken else ""
        raise UsageError(
            f"{index} names {', '.join(file.name for file in absent[:3])}, which {'are' if len(absent) > 1 else 'is'} not in "
            f"the folder{where}"
        )
    return files


def _names_of_index(index: Path) -> dict[str, str]:
    try:
        return {
            str(key): str(name) for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no checkpoint index ({error!r}); expected JSON with a weight_map") from error


def _is_inside(folder: Path, file: Path) -> bool:
    """By the names alone: a hub's files are links to elsewhere."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(file)).parents


def _unread_index(path: Path, files: dict[str, Path]) -> tuple[str, ...]:
    """What is said of an index beside the single file, which wins: it may be left over from another save. Nothing, where the
    two agree."""
    index = path / INDEX
    if not index.is_file():
        return ()
    try:
        listed = _files_of_index(index)
    except UsageError:
        listed = {}
    if listed and set(listed.values()) == {path / SINGLE} and listed.keys() == files.keys():
        return ()
    differ = "whose tensors are others: it is stale" if listed.keys() != files.keys() else "of the same tensors"
    return (
        f"{path} holds both {SINGLE} and {INDEX}, {differ}; {SINGLE} is read, as transformers does; remove the one that is "
        "not meant",
    )


def _no_weights(path: Path) -> str:
    if (path / SINGLE).is_symlink():
        return f"{path / SINGLE} is a link to {os.readlink(path / SINGLE)}, where nothing is; copy or download it again"
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        return (
            f"model.path is {str(path)!r}, which holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, but "
            f"neither {SINGLE} nor {INDEX}, and transformers reads no other weights; copy the index too, or rename a single "
            f"file to {SINGLE}"
        )
    pickles = [file.name for pattern in PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        return (
            f"model.path is {str(path)!r}, which holds its weights only as pickles ({pickles[0]}), and pickles run code when "
            "read; convert them to safetensors (transformers: save_pretrained) and try again"
        )
    return f"model.path is {str(path)!r}, which holds no weights; looked for {SINGLE} and {INDEX}"


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str, tuple[int, int]]]:
    """Shape, type, first byte and bytes of each tensor. safetensors checks the file, and does not say where its values begin: a
    file is the header's length in 8 bytes, the header in JSON, and the values."""
    try:
        # The plain opening first: safetensors says of a file that it may not read that it is not there.
        with file.open("rb") as raw, safe_open(file, framework="pt", device="cpu") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            length = int.from_bytes(raw.read(8), "little")
            listed = json.loads(raw.read(length))
        offsets = {key: listed[key]["data_offsets"] for key in slices}
        return {
            key: (tuple(piece.get_shape()), str(piece.get_dtype()), (8 + length + first, end - first))
            for key, piece in slices.items()
            for first, end in [offsets[key]]
        }
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            f"{file} cannot be read ({why}); accepted: a file that this user may read, on every host"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{file} is no whole safetensors file ({error}); copy or download it again") from error
