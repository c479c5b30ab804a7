"""A folder appears whole under its name, or not at all. (Files: tests/checkpoint/test_store.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_subspace.atomic_files import StorageError, begin_folder, storage_error, whole_folder
from dist_subspace.errors import UsageError


def test_a_folder_appears_with_everything_in_it_and_leaves_nothing_hidden(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out") as hidden:
        (hidden / "a").write_text("1")
        assert hidden.name == ".out.partial" and not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UsageError])
def test_an_error_in_the_block_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "out") as hidden:
        (hidden / "a").write_text("1")
        raise error("no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"out could not be written \(No space left on device; .* MiB free\)"):
        with whole_folder(tmp_path / "out"):
            Path("/dev/full").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_published_can_be_read_by_others(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as hidden:
        (hidden / "below").mkdir()
        for file in (hidden / "a", hidden / "below" / "b"):
            file.touch(mode=0o600)  # as safetensors gives its files to their owner alone
    assert [f.stat().st_mode & 0o777 for f in (tmp_path / "out" / "a", tmp_path / "out" / "below" / "b")] == [0o644] * 2


def test_a_refusal_under_a_hidden_name_names_what_was_to_appear(tmp_path: Path) -> None:
    for name, shown in ((".out.partial", "out"), (".adapter", ".adapter"), ("out", "out")):
        told = storage_error(tmp_path / name, OSError("No space left on device"))
        assert str(told).startswith(f"{tmp_path / shown} could not be written (No space left on device; ")


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("1")
    with whole_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and list((tmp_path / "out").iterdir()) == []


def test_a_target_that_holds_something_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(
            UsageError, match=rf"OUT is '.*{name}', which holds something already; accepted: a new or an"
        ):
            begin_folder(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as hidden:
        (hidden / "a").write_text("1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "empty" / "a").exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    with pytest.raises(UsageError, match=r"OUT is .*, which needs [\d,]+ MiB, and its disk has [\d,]+ MiB free"):
        begin_folder(tmp_path / "out", 2 * space.f_bavail * space.f_frsize + 2**40)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "old").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(target, replace=True) as hidden:
        (hidden / "new").write_text("2")
        raise KeyboardInterrupt
    assert (target / "deep" / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
    with whole_folder(target, replace=True) as hidden:
        (hidden / "below").mkdir()
        (hidden / "below" / "new").write_text("2")
        assert (target / "deep" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in target.iterdir()] == ["below"]
    assert (target / "below").stat().st_mode & 0o111 and (target / "below" / "new").read_text() == "2"


def test_a_folder_that_a_killed_process_had_set_aside_has_its_name_again(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", replace=True):
        raise RuntimeError("no")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "old").exists()
