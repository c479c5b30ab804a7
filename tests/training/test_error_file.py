"""torchrun itself reads what a rank has left it."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dist_subspace.training.error_file import tell_torchrun


def test_torchrun_s_table_holds_the_sentence(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    tell_torchrun("error: rank 2 on node3: the disk is full", {"TORCHELASTIC_ERROR_FILE": str(file)})
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file=str(file))
    assert failure.message == "error: rank 2 on node3: the disk is full" and failure.timestamp > 0
    table = str(ChildFailedError("train.py", {2: failure}))
    assert "rank 2 on node3: the disk is full" in table and "To enable traceback" not in table


def test_without_torchrun_or_its_folder_nothing_happens(tmp_path: Path) -> None:
    tell_torchrun("error", {})
    tell_torchrun("error", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "none" / "error.json")})
    assert not list(tmp_path.iterdir())
