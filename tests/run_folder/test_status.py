"""What became of a run is one small file, and the exit codes say the same."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.status import EXIT_STATUS, read_status, write_status

STATUS = "status.json"


def test_a_state_reads_back_with_its_message_step_rank_and_time(tmp_path: Path) -> None:
    write_status(tmp_path / "run", "running")
    write_status(tmp_path / "run", "failed", "out of memory", step=7, rank=3)
    found = read_status(tmp_path / "run") or {}
    assert set(found) == {"state", "message", "step", "rank", "time"}
    assert (found["state"], found["message"], found["step"], found["rank"]) == ("failed", "out of memory", 7, 3)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["time"])).total_seconds()) < 60
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STATUS]


def test_a_heartbeat_and_a_rank_that_fails_at_the_same_moment_do_not_write_into_one_file(tmp_path: Path) -> None:
    """What one of them has half-written (here a folder, which nobody can write into) does not keep the other out."""
    for partial, more in ((f".{STATUS}.partial", {"heartbeat": "now"}), (f".{STATUS}.heartbeat.partial", {})):
        (tmp_path / partial).mkdir()
        write_status(tmp_path, "failed", str(more), **more)
        assert (read_status(tmp_path) or {})["message"] == str(more)
        (tmp_path / partial).rmdir()


def test_no_status_or_a_damaged_one_reads_as_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    for text in ("", "{", "[]", "\x00"):
        (tmp_path / STATUS).write_text(text)
        assert read_status(tmp_path) is None


def test_an_unknown_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="accepted: running, finished, refused, interrupted, failed"):
        write_status(tmp_path, "done")  # type: ignore[arg-type]


def test_the_exit_codes_are_those_that_schedulers_are_told_of() -> None:
    assert EXIT_STATUS == {"finished": 0, "refused": 2, "interrupted": 75, "failed": 1}
