"""Whether the ranks see one folder, or each node one of its own at that path: found out, and never configured.

Rank 0 leaves a file there whose name and content are drawn anew each time, so that no copy of the folder can hold it, and no
network file system can remember that it is not there. Such a file system may still take seconds to show it: a rank that does
not see it looks again for a few. A folder that is shared and looks apart all the same costs work that is done twice, and
nothing else: whoever asks must be right with either answer.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from dist_subspace.placement.collectives import agreed, gather_objects, on_main, world

PATIENCE = 3.0  # seconds in which a file of rank 0 has come into sight
_BETWEEN_LOOKS = 0.1
_MARK = ".seen-"
_LEFT_BEHIND = 3600.0  # seconds after which a mark is nobody's any more: the process that left it was killed


def seen_by_ranks(folder: str | os.PathLike[str], patience: float | None = None) -> list[bool]:
    """Collective: for every rank, in their order, whether it sees what rank 0 writes in the folder.

    Each rank names the folder by its own path, under which it need not exist but for rank 0, which makes it. Where rank 0 cannot
    write, nothing is known, and every rank is said to see a folder of its own. patience: in seconds; unset: `PATIENCE`.
    """
    if world().size == 1:
        return [True]
    patience = PATIENCE if patience is None else patience
    mark = on_main(_leave_mark, Path(folder))
    with agreed("looking for a file of rank 0"):
        found = world().is_main or (mark is not None and _finds(Path(folder) / mark, mark, patience))
    seen = gather_objects(found)
    if mark is not None:
        on_main(_take_away, Path(folder) / mark)
    return seen


def look_anew(folder: str | os.PathLike[str]) -> None:
    """Local: make a network file system ask its server what is in the folder, and in those above it."""
    path = Path(os.path.abspath(folder))
    for above in (*reversed(path.parents), path):
        with suppress(OSError), os.scandir(above) as entries:
            next(entries, None)


def _leave_mark(folder: Path) -> str | None:
    name = f"{_MARK}{secrets.token_hex(16)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        with (folder / name).open("w", encoding="ascii") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    return name


def _clear(folder: Path) -> None:
    for mark in folder.glob(f"{_MARK}*"):
        with suppress(OSError):
            if time.time() - mark.stat().st_mtime > _LEFT_BEHIND:
                mark.unlink()


def _finds(file: Path, text: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        look_anew(file.parent)
        with suppress(OSError, UnicodeDecodeError):
            if file.read_text(encoding="ascii") == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_BETWEEN_LOOKS)


def _take_away(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
