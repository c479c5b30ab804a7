"""RUN/status.json: what became of a run, for schedulers whose launcher changes the exit status. Local: rank 0 alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from dist_subspace.atomic_files import write_json_atomic
from dist_subspace.errors import unknown_name
from dist_subspace.run_folder.folder import RunFolder, StrPath

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again, and the run continues

State = Literal["running", "finished", "refused", "interrupted", "failed"]

EXIT_STATUS: dict[str, int] = {
    "finished": EXIT_OK,
    "refused": EXIT_USAGE,
    "interrupted": EXIT_INTERRUPTED,
    "failed": EXIT_FAILED,
}


def write_status(
    run_dir: StrPath,
    state: State,
    message: str = "",
    step: int | None = None,
    rank: int | None = None,
    **more: Any,
) -> None:
    """Replace RUN/status.json in one rename. `rank` is the rank at fault; `time` is the present, in UTC.

    A state of `running` that is found with no process behind it means a run that was killed.

    Arguments:
        more: what else is known: `host`, `pid` and `heartbeat` (the time when it was last alive) of the process that writes;
            `rank_host`, the host of the rank at fault; `warning`, a sentence about a run that finished; `skipped`, how many of
            its steps were not applied.

    Raises:
        StorageError: the file cannot be written.
    """
    if state not in get_args(State):
        raise unknown_name("state", state, get_args(State))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file = RunFolder(run_dir).status
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {"state": state, "message": message, "step": step, "rank": rank, "time": now}
    # The rank that fails and the heartbeat of rank 0 may write at the same moment.
    write_json_atomic(file, known | more, writer=".heartbeat" if "heartbeat" in more else "")


def read_status(run_dir: StrPath) -> dict[str, Any] | None:
    """What `write_status` wrote, or None where there is none or it cannot be read."""
    try:
        status = json.loads(RunFolder(run_dir).status.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None
