"""One file replaced by one rename, after its bytes are on disk: what every other file of a run is written with. Local."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = "partial"


class StorageError(OSError):
    """A file or checkpoint could not be written (a full disk, a lost mount); nothing half-written is left behind."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the file by one rename after the text is on disk: a reader sees the old text or the new, never a part.

    Raises:
        StorageError: the disk is full or refuses; the old file stays.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise storage_error(target, error) from error


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_text_atomic` of indented JSON; see `json_ready` for numbers that JSON has no word for."""
    write_text_atomic(path, json.dumps(json_ready(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_ready(value: Any) -> Any:
    """The same value with every NaN and infinity as None: `NaN` is not JSON, and strict readers refuse the file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk. A folder is a file of names: a rename is certain once it is there too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError | SafetensorError) -> StorageError:
    """The one error of this package for a write that failed: the path, the reason, the free space."""
    if isinstance(error, StorageError):
        return error
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{path} could not be written ({reason}{_free_space(path.parent)})")


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB free"
    except OSError:
        return ""
