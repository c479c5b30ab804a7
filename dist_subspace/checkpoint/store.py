"""Files that are whole or absent, whatever moment the process dies at. Local: rank 0 alone calls these.

What may be found after a kill, and what it means:
    .checkpoint-7.partial    a checkpoint that was being written: worthless, removed at the next start;
    .checkpoint-7.replaced   the former checkpoint-7, set aside for the instant between two renames: it counts as
                             checkpoint-7 for as long as there is none, and is removed once there is one again;
    .checkpoint-7.removed    a checkpoint that was being deleted: removed at the next start;
    checkpoint-7             complete, on disk, and listed in its MANIFEST.json. A later fault of the disk shows
                             in `verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from dist_subspace.atomic_files import MANIFEST as MANIFEST
from dist_subspace.atomic_files import PARTIAL, REPLACED, make_folder, storage_error, sync
from dist_subspace.atomic_files import StorageError as StorageError
from dist_subspace.atomic_files import json_ready as json_ready
from dist_subspace.atomic_files import write_json_atomic as write_json_atomic
from dist_subspace.atomic_files import write_text_atomic as write_text_atomic
from dist_subspace.errors import UsageError

REMOVED = "removed"

_FINAL = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(rf"\.checkpoint-(\d+)\.({PARTIAL}|{REPLACED}|{REMOVED})")
_CHUNK = 1 << 20


def check_writable(run_dir: str | Path) -> None:
    """Make the run's folder and prove that a file can be written there.

    Raises:
        UsageError: naming `run.output_dir` and the reason of the operating system.
    """
    folder = Path(run_dir)
    probe = folder / ".writable"
    try:
        make_folder(folder)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"run.output_dir is {str(run_dir)!r}, which cannot be written to ({reason})") from error


def write_checkpoint(run_dir: str | Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a hidden folder, put it on disk with its manifest, and rename it to `checkpoint-<step>`.

    An existing checkpoint of that step is replaced; until the new one has its name, one of them is whole and found by
    `newest_whole`. Whatever `write` raises passes through after the hidden folder is removed.

    Raises:
        StorageError: the disk is full or refuses; names the folder, the reason and the free space.
    """
    run = Path(run_dir)
    final, partial = run / f"checkpoint-{step}", _hidden(run, step, PARTIAL)
    try:
        make_folder(run)
        _settle_step(run, step)
        partial.mkdir()
        write(partial)
        _write_manifest(partial)
        sync(run)
        _publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own name for a full disk
            raise storage_error(final, error) from error
        raise
    return final


def verify(folder: str | Path) -> str | None:
    """None for a folder whose every listed file has its size and sha256; else the reason, naming the file."""
    path = Path(folder)
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{path.name}/{MANIFEST} cannot be read ({error})"
    if not isinstance(listed, dict) or not listed:
        return f"{path.name}/{MANIFEST} lists no files"
    return next((reason for name, entry in listed.items() if (reason := _damage(path, name, entry))), None)


def checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """Every checkpoint folder by step, ascending, whole or not; also one that was set aside and not yet replaced."""
    found: dict[int, Path] = {}
    for path in _folders(Path(run_dir)):
        if match := _HIDDEN.fullmatch(path.name):
            if match[2] == REPLACED:
                found.setdefault(int(match[1]), path)
        elif match := _FINAL.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_whole(run_dir: str | Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that passes its manifest, or None; each newer one that does not is reported and left."""
    for path in reversed(checkpoints(run_dir).values()):
        reason = verify(path)
        if reason is None:
            return path
        report(f"{path} is damaged and skipped: {reason}")
    return None


def purge(run_dir: str | Path, limit: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest checkpoints until `limit` are left; returns those deleted. None keeps everything.

    Those in `keep` (the best one) count among the limit and stay; so does the newest whole one, whatever the limit:
    a purge must never take the only folder that a run can be resumed from.
    """
    if limit is None:
        return []
    found = checkpoints(run_dir)
    kept = {path.resolve() for path in keep}
    whole = newest_whole(run_dir, report=lambda message: None)
    if whole is not None:
        kept.add(whole.resolve())
    spare = [path for path in found.values() if path.resolve() not in kept]
    excess = max(0, len(found) - max(limit, 0))
    for path in spare[:excess]:
        _delete(Path(run_dir), path)
    return spare[:excess]


def remove_leftovers(run_dir: str | Path) -> list[str]:
    """At the start of a run: settle what a killed one left; returns a sentence for each thing that was done."""
    run = Path(run_dir)
    steps = sorted({int(match[1]) for path in _folders(run) if (match := _HIDDEN.fullmatch(path.name))})
    return [sentence for step in steps for sentence in _settle_step(run, step)]


def _hidden(run: Path, step: int, state: str) -> Path:
    return run / f".checkpoint-{step}.{state}"


def _folders(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if path.is_dir()] if run.is_dir() else []


def _write_manifest(folder: Path) -> None:
    """Last of all files, and only after the others are on disk: a manifest vouches for bytes that cannot get lost."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): _describe(path) for path in files}
    for path in files:
        sync(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    write_json_atomic(folder / MANIFEST, listed)


def _publish(partial: Path, final: Path) -> None:
    """Give the finished folder its name. POSIX cannot swap two folders at once, so the old one is set aside."""
    aside = _hidden(final.parent, int(final.name.rpartition("-")[2]), REPLACED)
    replacing = final.exists()
    if replacing:
        os.rename(final, aside)
    os.rename(partial, final)
    sync(final.parent)
    if replacing:
        shutil.rmtree(aside, ignore_errors=True)


def _settle_step(run: Path, step: int) -> list[str]:
    """Undo the hidden remains of one step: take the set-aside folder back if there is no other, delete the rest."""
    said = []
    final, aside = run / f"checkpoint-{step}", _hidden(run, step, REPLACED)
    if aside.is_dir() and not final.exists():
        os.rename(aside, final)
        sync(run)
        said.append(f"{final.name} had been set aside and has its name again")
    for state in (PARTIAL, REPLACED, REMOVED):
        path = _hidden(run, step, state)
        if path.is_dir():
            shutil.rmtree(path)
            said.append(f"{path.name}, left by an interrupted run, was removed")
    return said


def _delete(run: Path, path: Path) -> None:
    """Renamed first, and for certain: a kill or a lost power in the middle leaves a hidden folder, not a checkpoint that looks
    damaged."""
    if match := _FINAL.fullmatch(path.name):
        hidden = _hidden(run, int(match[1]), REMOVED)
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        sync(run)
        path = hidden
    shutil.rmtree(path, ignore_errors=True)


def _damage(folder: Path, name: str, entry: Any) -> str | None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(entry, dict):
        return f"{folder.name}/{MANIFEST} has no usable entry for {name!r}"
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            return f"{folder.name}/{name} has {size} bytes, but {MANIFEST} says {entry.get('size')}"
        if _sha256(path) != entry.get("sha256"):
            return f"{folder.name}/{name} does not have the sha256 that {MANIFEST} says"
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
