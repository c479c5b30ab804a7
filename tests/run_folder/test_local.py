"""The folder of a run on a node: its user's alone, and found again by the run's name."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.local import LocalFolder, local_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which everybody may write."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_it_lies_in_tmpdir_or_in_the_folder_that_is_named(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    unset, named = local_folder(None, "/runs/one"), local_folder("/scratch/fast", "/runs/one")
    assert unset.path.parent == temporary / "dist_subspace-ada" and named.path.parent == Path("/scratch/fast")
    assert unset.path.name == named.path.name and unset.path.name.startswith("one-")
    assert (named.tokens, named.log(3)) == (named.path / "tokens", named.path / "logs" / "rank-3.log")
    assert os.fspath(named) == str(named) == str(named.path)


def test_every_run_has_its_own_and_the_same_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder(None, "a/run").path == local_folder(None, tmp_path / "a" / "run").path
    assert local_folder(None, "a/run").path != local_folder(None, "b/run").path


def test_a_user_without_a_name_has_one_by_number(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # nobody's
    assert local_folder(None, "run").path.parent == temporary / f"dist_subspace-{os.geteuid()}"


@pytest.mark.parametrize("local_dir", [None, "given/below"])
def test_only_its_user_sees_into_it(local_dir: str | None, tmp_path: Path) -> None:
    folder = local_folder(None if local_dir is None else str(tmp_path / local_dir), "runs/one")
    folder.make()
    assert mode(folder.path) == 0o700
    folder.path.chmod(0o755)
    (folder.path / "kept").write_text("")
    folder.make()
    assert mode(folder.path) == 0o700 and (folder.path / "kept").exists()
    if local_dir is None:
        assert mode(folder.path.parent) == 0o700


def refusal(folder: LocalFolder) -> str:
    with pytest.raises(UsageError) as error:
        folder.make()
    return str(error.value)


@pytest.mark.parametrize("above", [False, True])
def test_a_link_that_somebody_has_left_there_is_not_followed(above: bool, tmp_path: Path) -> None:
    folder = local_folder(None, "runs/one")
    planted = folder.path.parent if above else folder.path
    planted.parent.mkdir(exist_ok=True)
    (tmp_path / "trap").mkdir()
    planted.symlink_to(tmp_path / "trap")
    assert refusal(folder) == (
        f"{planted}, which run.local_dir means on {socket.gethostname()}, is a link; accepted: a run.local_dir on a disk of "
        "each node where this user can make a folder"
    )
    assert list((tmp_path / "trap").iterdir()) == []


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fast")
    folder = local_folder(str(tmp_path / "link"), "runs/one")
    folder.make()
    assert (tmp_path / "fast" / folder.path.name).is_dir()


def test_another_users_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder(None, "runs/one")
    folder.make()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(folder.path).st_uid + 1)
    assert "is another user's; accepted: " in refusal(folder)


def test_what_is_no_folder_and_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is no folder; accepted: " in refusal(LocalFolder(tmp_path / "file"))
    assert "cannot be made (Not a directory); accepted: " in refusal(LocalFolder(tmp_path / "file" / "a" / "b"))
