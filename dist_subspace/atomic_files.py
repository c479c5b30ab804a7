"""One file replaced, or one folder made, by one rename after its bytes are on disk. Local."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dist_subspace.errors import UsageError

PARTIAL, REPLACED = "partial", "replaced"


class StorageError(OSError):
    """A file or checkpoint could not be written (a full disk, a lost mount); nothing half-written is left behind."""


def write_text_atomic(path: str | Path, text: str, writer: str = "") -> None:
    """Replace the file by one rename after the text is on disk: a reader sees the old text or the new, never a part.

    Arguments:
        writer: of several that may write the file at the same moment, each has a name of its own.

    Raises:
        StorageError: the disk is full or refuses; the old file stays.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}{writer}.{PARTIAL}")
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


def write_json_atomic(path: str | Path, value: Any, writer: str = "") -> None:
    """`write_text_atomic` of indented JSON; see `json_ready` for numbers that JSON has no word for."""
    write_text_atomic(path, json.dumps(json_ready(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", writer)


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


def make_folder(folder: Path) -> None:
    """A folder, and those above it that are not there yet, each with its name on disk: what is synced in it later is lost with
    the name of any of them."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)


def begin_folder(target: Path, needed: int = 0, replace: bool = False) -> Path:
    """An empty hidden folder beside a target that is to appear whole: `publish_folder` gives it the name. What a process that
    was killed left there is cleared away.

    Arguments:
        needed: bytes that will be written.
        replace: the target may hold something, which stays there until `publish_folder`.

    Raises:
        UsageError: the target holds something, or its disk has too little space. StorageError: the disk refuses.
    """
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"OUT is {str(target)!r}, which holds something already; accepted: a new or an empty folder")
    hidden, aside = hidden_folder(target), _beside(target, REPLACED)
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        if replace and aside.is_dir() and not target.exists():
            os.rename(aside, target)
        free = shutil.disk_usage(next(parent for parent in hidden.parents if parent.exists())).free
        if free < needed:
            raise UsageError(
                f"OUT is {str(target)!r}, which needs {needed / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB free"
            )
        make_folder(hidden.parent)
        hidden.mkdir()
    except OSError as error:
        raise storage_error(target, error) from error
    return hidden


def hidden_folder(target: Path) -> Path:
    """What `begin_folder` makes for a target."""
    return _beside(target, PARTIAL)


def _beside(target: Path, state: str) -> Path:
    return target.absolute().with_name(f".{target.absolute().name}.{state}")


def publish_folder(hidden: Path, target: Path, replace: bool = False) -> None:
    """Everything in the hidden folder is on disk; then it gets its name, onto nothing or onto an empty folder; with `replace`
    onto any, which is set aside for the instant between two renames (POSIX cannot swap two folders at once).

    Raises:
        StorageError: the disk refuses; the hidden folder is still there.
    """
    try:
        for path in hidden.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # libraries give new files to their owner alone
            sync(path)
        sync(hidden)
        aside = _beside(target, REPLACED)
        if replace:
            shutil.rmtree(aside, ignore_errors=True)
            if target.exists():
                os.rename(target, aside)
        os.rename(hidden, target)
        sync(target.absolute().parent)
        if replace:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise storage_error(target, error) from error


@contextmanager
def whole_folder(target: Path, needed: int = 0, replace: bool = False) -> Iterator[Path]:
    """The hidden folder to write into; it appears as `target` at the end of the block, or not at all.

    Raises:
        UsageError, StorageError: as `begin_folder` and `publish_folder`; a write in the block that the disk refuses.
    """
    hidden = hidden_folder(target)
    try:  # before the folder is made: a signal may come at any moment
        begin_folder(target, needed, replace)
        yield hidden
        publish_folder(hidden, target, replace)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise storage_error(target, error) from error
        raise


def storage_error(path: Path, error: OSError | SafetensorError) -> StorageError:
    """The one error of this package for a write that failed: the path, the reason, the free space."""
    if isinstance(error, StorageError):
        return error
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{_shown(path)} could not be written ({reason}{_free_space(path.parent)})")


def _shown(path: Path) -> Path:
    """The name that what lies under a hidden one is to get."""
    hidden = path.name.startswith(".") and path.name.endswith(f".{PARTIAL}")
    return path.with_name(path.name[1:].removesuffix(f".{PARTIAL}")) if hidden else path


def _free_space(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB free"
    except OSError:
        return ""
