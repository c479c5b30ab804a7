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
from dist_subspace.checkpoint.store import checkpoints

SET_ASIDE = "set-aside"
ADAPTER, METRICS, CONFIG = "adapter", "metrics.jsonl", "config.yaml"


def set_aside_others(
    run_dir: str | Path, step: int, resumed: Path | None, anew: bool, say: Callable[[str], None]
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
    run = Path(run_dir)
    elsewhere = resumed is not None and resumed.resolve().parent != run.resolve()
    ended = resumed is None and (run / ADAPTER).is_dir()  # a finished run whose checkpoints somebody has deleted
    foreign = anew or elsewhere or ended
    found = checkpoints(run)
    moved = [path for number, path in found.items() if foreign or number > step]
    if foreign:
        moved += [path for path in (run / METRICS,) if path.is_file()]
    if not moved and not (foreign and (run / ADAPTER).is_dir()):
        return None
    moved += [path for path in (run / ADAPTER,) if path.is_dir()]
    folder = move_aside(run, step, list(reversed(moved)), copies=(METRICS, CONFIG))
    start = f"goes on after step {step}" if step else "begins anew"
    say(
        f"{', '.join(path.name for path in moved)}: of a history that this run, which {start}, does not continue; "
        f"set aside in {folder}, which no run deletes"
    )
    return folder


def move_aside(run: Path, step: int, paths: Sequence[Path], copies: Sequence[str] = ()) -> Path:
    """A new folder `set-aside-<step>-<time>` with these of the run's files and folders, and with copies of others.

    The copies come first: a process that dies on the way has lost nothing. Then one rename each, in the given order.

    Raises:
        StorageError: the disk refuses.
    """
    folder = _new_folder(run, step)
    try:
        for name in copies:
            if (run / name).is_file() and run / name not in paths:
                shutil.copy2(run / name, folder / name)
                sync(folder / name)
        for path in paths:
            os.rename(path, folder / _plain_name(path))
        sync(folder)
        sync(run)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def _plain_name(path: Path) -> str:
    """`.checkpoint-7.replaced` stands for checkpoint-7 where there is no other."""
    return path.name[1:].partition(".")[0] if path.name.startswith(".") else path.name


def _new_folder(run: Path, step: int) -> Path:
    """Two starts within a second get a folder each."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1, 1000):
        folder = run / (f"{SET_ASIDE}-{step}-{now}" if number == 1 else f"{SET_ASIDE}-{step}-{now}-{number}")
        try:
            folder.mkdir()
            sync(run)  # what is moved into it is lost without its name
        except FileExistsError:
            continue
        except OSError as error:
            raise storage_error(folder, error) from error
        return folder
    raise FileExistsError(f"{run} has a thousand folders {SET_ASIDE}-{step}-{now}")
