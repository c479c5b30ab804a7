"""MANIFEST.json of a checkpoint: the size and the sha256 of every other file in it. Local."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from dist_subspace.atomic_files import sync, write_json_atomic
from dist_subspace.run_folder.folder import CheckpointFolder, StrPath

_CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Last of all files, and only after the others are on disk: a manifest vouches for bytes that cannot get lost."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): _describe(path) for path in files}
    for path in files:
        sync(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    write_json_atomic(CheckpointFolder(folder).manifest, listed)


def read_manifest(folder: StrPath) -> Any:
    """What the file says, by the names of the others: `{"size": bytes, "sha256": hex}`, unless somebody has edited it.

    Raises:
        OSError: there is none, or it cannot be read. ValueError: it is no JSON.
    """
    return json.loads(CheckpointFolder(folder).manifest.read_text(encoding="utf-8"))


def verify(folder: StrPath) -> str | None:
    """None for a folder whose every listed file has its size and sha256; else the reason, naming the file."""
    path, manifest = Path(folder), CheckpointFolder(folder).manifest.name
    try:
        listed = read_manifest(path)
    except FileNotFoundError:
        return f"{path.name} has no {manifest}"
    except (OSError, ValueError) as error:
        return f"{path.name}/{manifest} cannot be read ({error})"
    if not isinstance(listed, dict) or not listed:
        return f"{path.name}/{manifest} lists no files"
    return next((reason for name, entry in listed.items() if (reason := _damage(path, name, entry))), None)


def _damage(folder: Path, name: str, entry: Any) -> str | None:
    manifest = CheckpointFolder(folder).manifest.name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(entry, dict):
        return f"{folder.name}/{manifest} has no usable entry for {name!r}"
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            return f"{folder.name}/{name} has {size} bytes, but {manifest} says {entry.get('size')}"
        if _sha256(path) != entry.get("sha256"):
            return f"{folder.name}/{name} does not have the sha256 that {manifest} says"
    except FileNotFoundError:
        return f"{folder.name}/{name} is missing"
    except OSError as error:
        return f"{folder.name}/{name} cannot be read ({error.strerror or error})"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
