"""Cheap, stable identities of the frozen weights and of data files: not their path, but what they hold. Local.

A file up to a limit is hashed whole; a larger one by its size and evenly spaced samples, first and last bytes included.
Fine-tuned weights differ in every sample, a truncated or resumed download in its size, another architecture in its
header. What a sample cannot see is a large file that was edited in a few places without changing its length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.loading.index import weight_files

WHOLE_WEIGHTS = 64 << 20  # bytes: below this a weight file is hashed whole (a few tens of milliseconds)
WHOLE_DATA = 1 << 30  # bytes: the same for a data file, read once a run (about a second)
SAMPLES = 32
SAMPLE_BYTES = 64 << 10

# Keys that a tool rewrites without touching a weight; a key that begins with an underscore is one too.
_NOT_ARCHITECTURE = {"transformers_version", "torch_dtype", "dtype", "use_cache", "torchscript", "output_attentions"}


def base_fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over config.json's architecture and, file by file, names, shapes, types, size and sampled bytes.

    Moving or renaming the folder does not change it; neither does a new `transformers_version` in the configuration.

    Raises:
        UsageError: no config.json, no safetensors weights, or a file that is cut short; names it.
    """
    path = Path(folder)
    digest = hashlib.sha256()
    _add(digest, _architecture(path / "config.json"))
    for file in weight_files(path):
        header, start = _header(file)
        size = file.stat().st_size
        _add(digest, [file.name, size, header])
        for block in _samples(file, start, size, WHOLE_WEIGHTS):
            digest.update(block)
    return digest.hexdigest()


def file_fingerprint(path: str | Path) -> str:
    """sha256 (hex) of a data file's bytes; above 1 GiB of its size and samples.

    Raises:
        UsageError: no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{str(path)!r} is no file")
    size = file.stat().st_size
    digest = hashlib.sha256()
    _add(digest, size)
    for block in _samples(file, 0, size, WHOLE_DATA):
        digest.update(block)
    return digest.hexdigest()


def _architecture(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{str(path.parent)!r} is no model folder: it has no config.json") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from error
    return {key: value for key, value in config.items() if key[:1] != "_" and key not in _NOT_ARCHITECTURE}


def _header(file: Path) -> tuple[list[list[Any]], int]:
    """(name, dtype, shape) of every tensor, sorted, and the offset of the first data byte."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        tensors = [[n, e["dtype"], e["shape"]] for n, e in header.items() if n != "__metadata__"]
        end = 8 + length + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    except FileNotFoundError as error:
        raise UsageError(f"{str(file)!r} is missing, though the model's index names it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{str(file)!r} is no whole safetensors file ({error})") from error
    if end > file.stat().st_size:
        raise UsageError(f"{str(file)!r} is cut short: {file.stat().st_size} bytes of {end}")
    return sorted(tensors), 8 + length


def _samples(file: Path, start: int, end: int, whole: int) -> Iterator[bytes]:
    with file.open("rb") as handle:
        if end - start <= whole:
            handle.seek(start)
            while block := handle.read(1 << 20):
                yield block
            return
        stride = (end - start - SAMPLE_BYTES) // (SAMPLES - 1)
        for number in range(SAMPLES):
            last = number == SAMPLES - 1
            handle.seek(end - SAMPLE_BYTES if last else start + number * stride)
            yield handle.read(SAMPLE_BYTES)


def _add(digest: Any, value: Any) -> None:
    """One part, with its length before it, so that no two lists of parts give the same bytes."""
    text = json.dumps(value, sort_keys=True).encode()
    digest.update(len(text).to_bytes(8, "little") + text)
