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

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError

from dist_subspace.atomic_files import PARTIAL, REPLACED, make_folder, storage_error, sync
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import REMOVED, CheckpointFolder, RunFolder, StrPath
from dist_subspace.run_folder.manifest import verify, write_manifest


def check_writable(run_dir: StrPath) -> None:
    """Make the run's folder and prove that a file can be written there.

    Raises:
        UsageError: naming `run.output_dir` and the reason of the operating system.
    """
    run = RunFolder(run_dir)
    probe = run.probe
    try:
        make_folder(run.path)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"run.output_dir is {str(run_dir)!r}, which cannot be written to ({reason})") from error


def write_checkpoint(run_dir: StrPath, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a hidden folder, put it on disk with its manifest, and rename it to `checkpoint-<step>`.

    An existing checkpoint of that step is replaced; until the new one has its name, one of them is whole and found by
    `newest_whole`. Whatever `write` raises passes through after the hidden folder is removed.

    Raises:
        StorageError: the disk is full or refuses; names the folder, the reason and the free space.
    """
    run = RunFolder(run_dir)
    final, partial = run.checkpoint(step), run.hidden_checkpoint(step, PARTIAL)
    try:
        make_folder(run.path)
        _clear_leftovers(run, step)
        partial.mkdir()
        write(partial)
        write_manifest(partial)
        sync(run.path)
        _publish(partial, final, aside=run.hidden_checkpoint(step, REPLACED))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own name for a full disk
            raise storage_error(final, error) from error
        raise
    return final


def newest_whole(run_dir: StrPath, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that passes its manifest, or None; each newer one that does not is reported and left."""
    for path in reversed(RunFolder(run_dir).checkpoints().values()):
        reason = verify(path)
        if reason is None:
            return path
        report(f"{path} is damaged and skipped: {reason}")
    return None


def purge(run_dir: StrPath, limit: int | None, keep: Collection[Path] = ()) -> list[Path]:
    """Delete the oldest checkpoints until `limit` are left; returns those deleted. None keeps everything.

    Those in `keep` (the best one) count among the limit and stay; so does the newest whole one, whatever the limit:
    a purge must never take the only folder that a run can be resumed from.
    """
    if limit is None:
        return []
    run = RunFolder(run_dir)
    saved = run.checkpoints()
    kept = {path.resolve() for path in keep}
    whole = newest_whole(run, report=lambda message: None)
    if whole is not None:
        kept.add(whole.resolve())
    spare = [path for path in saved.values() if path.resolve() not in kept]
    excess = max(0, len(saved) - max(limit, 0))
    for path in spare[:excess]:
        _delete(run, path)
    return spare[:excess]


def remove_leftovers(run_dir: StrPath) -> list[str]:
    """At the start of a run: clear what a killed one left; returns a sentence for each thing that was done."""
    run = RunFolder(run_dir)
    return [sentence for step in run.steps_with_leftovers() for sentence in _clear_leftovers(run, step)]


def _publish(partial: Path, final: Path, aside: Path) -> None:
    """Give the finished folder its name. POSIX cannot swap two folders at once, so the old one is set aside."""
    replacing = final.exists()
    if replacing:
        os.rename(final, aside)
    os.rename(partial, final)
    sync(final.parent)
    if replacing:
        shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(run: RunFolder, step: int) -> list[str]:
    """Undo the hidden remains of one step: take the set-aside folder back if there is no other, delete the rest."""
    said = []
    final, aside = run.checkpoint(step), run.hidden_checkpoint(step, REPLACED)
    if aside.is_dir() and not final.exists():
        os.rename(aside, final)
        sync(run.path)
        said.append(f"{final.name} had been set aside and has its name again")
    for state in (PARTIAL, REPLACED, REMOVED):
        path = run.hidden_checkpoint(step, state)
        if path.is_dir():
            shutil.rmtree(path)
            said.append(f"{path.name}, left by an interrupted run, was removed")
    return said


def _delete(run: RunFolder, path: Path) -> None:
    """Renamed first, and for certain: a kill or a lost power in the middle leaves a hidden folder, not a checkpoint that looks
    damaged."""
    if (step := CheckpointFolder(path).step) is not None:
        hidden = run.hidden_checkpoint(step, REMOVED)
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        sync(run.path)
        path = hidden
    shutil.rmtree(path, ignore_errors=True)
