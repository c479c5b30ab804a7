"""Where the main thread of this process is, as another thread of it sees: for a rank that lives, and does not come. Local."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import PurePath

WAITS = "waits for the others"
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_OURS = "dist_subspace/"


def where_main_thread_is() -> str:
    """`training/data/batches.py:88 (read)`, the innermost place of this package, and behind it that of a library where it is in
    one; `WAITS ...` where it is inside a collective."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    if frame is None:
        return "nowhere"
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)  # the innermost first
    files = [PurePath(each.filename).as_posix() for each in stack]
    places = [f"{_short(file)}:{each.lineno} ({each.name})" for file, each in zip(files, stack, strict=True)]
    ours = next((place for file, place in zip(files, places, strict=True) if _OURS in file), None)
    text = places[0] if ours in (None, places[0]) else f"{ours}, there in {places[0]}"
    waits = any(part in file for file in files for part in _COLLECTIVES)
    return f"{WAITS}: {text}" if waits else text


def _short(file: str) -> str:
    """The last three parts of a path, or what comes behind this package's own folder."""
    inside = file.rpartition(_OURS)
    return inside[2] if inside[1] else "/".join(PurePath(file).parts[-3:])
