"""What a run finds in its folder and does not continue: another history, which is moved away and never deleted.

`RUN/set-aside-<step>-<time>/` holds the checkpoints (under their names), the adapter, metrics.jsonl and config.yaml as they
were: a run's folder in itself, but for the factors, which stay in RUN/factors. `step` is the one that the new history
goes on after. No purge looks into such a folder, and `checkpoint.resume: auto` does not either. Local: rank 0 alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from dist_subspace.atomic_files import storage_error, sync
from dist_subspace.run_folder.folder import RunFolder, StrPath


def set_aside_others(
    run_dir: StrPath, step: int, resumed: Path | None, anew: bool, say: Callable[[str], None]
) -> Path | None:
    """Move away what a run that goes on after `step` would overwrite, or would be taken for a part of; returns the folder.

    Checkpoints of this folder beyond `step` are of another history. So is everything in it where the checkpoint that is
    continued from lies elsewhere, or where the user asks for a new beginning. Where there is nothing of that kind (a run
    that goes on from its newest checkpoint), nothing is moved.

    Arguments:
        step: the step of the checkpoint that is continued from; 0 for none.
        resumed: that checkpoint's folder.
        anew: a new beginning was asked for, and is not just what is left where no checkpoint is whole.

    Raises:
        StorageError: the disk refuses; what was moved by then is in the new folder.
    """
    run = RunFolder(run_dir)
    elsewhere = resumed is not None and not run.holds(resumed)
    ended = resumed is None and run.adapter.is_dir()  # a finished run whose checkpoints somebody has deleted
    foreign = anew or elsewhere or ended
    moved = [path for number, path in run.checkpoints().items() if foreign or number > step]
    if foreign and run.metrics.is_file():
        moved.append(run.metrics)
    if not moved and not (foreign and run.adapter.is_dir()):
        return None
    if run.adapter.is_dir():
        moved.append(run.adapter)
    folder = move_aside(run, step, list(reversed(moved)), copies=(run.metrics, run.config))
    start = f"goes on after step {step}" if step else "begins anew"
    say(
        f"{', '.join(path.name for path in moved)}: of a history that this run, which {start}, does not continue; "
        f"set aside in {folder}, which no run deletes"
    )
    return folder


def move_aside(run: RunFolder, step: int, paths: Sequence[Path], copies: Sequence[Path] = ()) -> Path:
    """A new folder `set-aside-<step>-<time>` with these of the run's files and folders, and with copies of others.

    The copies come first: a process that dies on the way has lost nothing. Then one rename each, in the given order.

    Raises:
        StorageError: the disk refuses.
    """
    folder = _new_folder(run, step)
    try:
        for path in copies:
            if path.is_file() and path not in paths:
                shutil.copy2(path, folder / path.name)
                sync(folder / path.name)
        for path in paths:
            os.rename(path, folder / _plain_name(path))
        sync(folder)
        sync(run.path)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def _plain_name(path: Path) -> str:
    """`.checkpoint-7.replaced` stands for checkpoint-7 where there is no other."""
    return path.name[1:].partition(".")[0] if path.name.startswith(".") else path.name


def _new_folder(run: RunFolder, step: int) -> Path:
    """Two starts within a second get a folder each."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1, 1000):
        folder = run.set_aside(step, now, number)
        try:
            folder.mkdir()
            sync(run.path)  # what is moved into it is lost without its name
        except FileExistsError:
            continue
        except OSError as error:
            raise storage_error(folder, error) from error
        return folder
    raise FileExistsError(f"{run} has a thousand folders {run.set_aside(step, now).name}")
