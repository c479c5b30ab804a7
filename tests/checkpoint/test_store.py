"""Whatever moment a process dies at, what is found afterwards is whole, or is skipped."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_subspace.atomic_files import StorageError, json_ready, write_json_atomic, write_text_atomic
from dist_subspace.checkpoint.store import check_writable, newest_whole, purge, remove_leftovers, write_checkpoint
from dist_subspace.errors import UsageError
from dist_subspace.run_folder import RunFolder
from dist_subspace.run_folder.manifest import verify

MANIFEST = "MANIFEST.json"


def fill(folder: Path, value: int = 1) -> None:
    (folder / "factors").mkdir()
    save_file({"a": torch.full((64,), float(value))}, folder / "adapter_model.safetensors")
    save_file({"u": torch.full((8,), float(value))}, folder / "factors" / "basis.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"value": value}))


def value_of(folder: Path) -> int:
    return int(json.loads((folder / "trainer_state.json").read_text())["value"])


def no_report(message: str) -> None:
    raise AssertionError(f"nothing is damaged, but: {message}")


def test_a_checkpoint_appears_whole_and_leaves_nothing_hidden(tmp_path: Path) -> None:
    seen: list[str] = []
    folder = write_checkpoint(tmp_path / "run", 7, lambda f: (fill(f), seen.append(f.name))[0])
    assert seen == [".checkpoint-7.partial"] and folder == tmp_path / "run" / "checkpoint-7"
    assert verify(folder) is None and newest_whole(tmp_path / "run", no_report) == folder
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-7"]


def test_the_manifest_lists_size_and_hash_of_every_other_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, fill)
    listed = json.loads((folder / MANIFEST).read_text())
    assert set(listed) == {"adapter_model.safetensors", "factors/basis.safetensors", "trainer_state.json"}
    for name, entry in listed.items():
        assert set(entry) == {"size", "sha256"} and entry["size"] == (folder / name).stat().st_size


def test_every_kind_of_damage_is_found_and_names_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, fill)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        assert "checkpoint-1/adapter_model.safetensors" in str(verify(folder))
    weights.unlink()
    assert "adapter_model.safetensors is missing" in str(verify(folder))
    weights.write_bytes(whole)
    assert verify(folder) is None
    for manifest in ("", "{", "{}", "[1]", '{"../x": {"size": 1}}', '{"trainer_state.json": 3}'):
        (folder / MANIFEST).write_text(manifest)
        assert MANIFEST in str(verify(folder))
    (folder / MANIFEST).unlink()
    assert f"no {MANIFEST}" in str(verify(folder))


def test_a_damaged_checkpoint_is_reported_and_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step, fill)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 1 and "checkpoint-10" in said[0] and "trainer_state.json" in said[0]
    assert newest_whole(tmp_path / "absent", no_report) is None


def test_the_same_step_is_replaced_and_one_of_both_is_always_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, lambda f: fill(f, 1))
    found: list[int] = []

    def second(folder: Path) -> None:
        fill(folder, 2)
        found.append(value_of(newest_whole(tmp_path, no_report) or folder))

    assert value_of(write_checkpoint(tmp_path, 3, second)) == 2
    assert found == [1] and [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    os.rename(write_checkpoint(tmp_path, 3, fill), tmp_path / ".checkpoint-3.replaced")
    assert newest_whole(tmp_path, no_report) == tmp_path / ".checkpoint-3.replaced"
    (tmp_path / ".checkpoint-5.partial").mkdir()
    assert len(remove_leftovers(tmp_path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert newest_whole(tmp_path, no_report) == tmp_path / "checkpoint-3"


def test_one_that_was_set_aside_never_stands_for_the_one_that_has_its_name(tmp_path: Path) -> None:
    """In whatever order the disk lists them."""
    for step in range(1, 9):
        os.rename(write_checkpoint(tmp_path, step, lambda f: fill(f, 1)), tmp_path / f".checkpoint-{step}.replaced")
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert RunFolder(tmp_path).checkpoints() == {step: tmp_path / f"checkpoint-{step}" for step in range(1, 9)}


def test_what_a_killed_process_left_of_a_step_does_not_stand_in_its_way(tmp_path: Path) -> None:
    for state in ("partial", "removed"):
        (tmp_path / f".checkpoint-3.{state}").mkdir()
        (tmp_path / f".checkpoint-3.{state}" / "old").write_text("1")
    assert value_of(write_checkpoint(tmp_path, 3, lambda f: fill(f, 2))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"] and not (tmp_path / "checkpoint-3" / "old").exists()


@pytest.mark.parametrize("state", ["partial", "removed"])
def test_a_checkpoint_that_was_being_written_or_deleted_is_none_even_if_it_is_whole(state: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, fill)
    os.rename(write_checkpoint(tmp_path, 3, fill), tmp_path / f".checkpoint-3.{state}")
    assert (
        list(RunFolder(tmp_path).checkpoints()) == [2]
        and newest_whole(tmp_path, no_report) == tmp_path / "checkpoint-2"
    )
    assert purge(tmp_path, 1) == []


def test_an_error_while_writing_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, fill)

    def broken(folder: Path) -> None:
        fill(folder, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 3, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"] and value_of(tmp_path / "checkpoint-3") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_clear_error_and_nothing_is_left(tmp_path: Path) -> None:
    def onto_full_disk(folder: Path) -> None:
        (folder / "trainer_state.json").write_text("{}")
        Path("/dev/full").write_bytes(b"x")

    with pytest.raises(
        StorageError, match=r"checkpoint-4 could not be written \(No space left on device; .* MiB free\)"
    ):
        write_checkpoint(tmp_path, 4, onto_full_disk)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses bytes beyond 64 KiB a file, as a full disk would, to Python and to safetensors' own writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_without_room_is_refused_whoever_writes_it(tmp_path: Path, small_files: None) -> None:
    write_text_atomic(tmp_path / "status.json", "old")
    large = {"a": torch.zeros(1 << 20)}
    with pytest.raises(StorageError, match=r"checkpoint-1 could not be written .*File too large"):
        write_checkpoint(tmp_path, 1, lambda folder: save_file(large, folder / "a.safetensors"))
    with pytest.raises(StorageError, match=r"status.json could not be written .*File too large"):
        write_text_atomic(tmp_path / "status.json", "x" * (1 << 20))
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"] and (tmp_path / "status.json").read_text() == "old"


def write_for_ever(run: Path, pipe: int) -> None:
    """Every step is written twice, the second time in place of the first; then old ones are purged."""
    for turn in range(10**6):

        def fill_large(folder: Path, turn: int = turn) -> None:
            (folder / "factors").mkdir()
            for name in ("a.safetensors", "factors/b.safetensors"):
                (folder / name).write_bytes(bytes([turn % 251]) * 20000)
            (folder / "trainer_state.json").write_text(json.dumps({"value": turn}))

        write_checkpoint(run, turn // 2, fill_large)
        os.write(pipe, f"{turn}\n".encode())
        purge(run, 2)


def killed_after(run: Path, seconds: float) -> int:
    """Let a child process write until it is killed; the last turn that it said was written."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(run, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        first = said.readline()
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        turns = [first, *said.readlines()]
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return int(turns[-1])


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Each kill hits another moment of the loop; what was said to be written is found whole, or something newer is."""
    moments = random.Random(0)
    hidden: set[str] = set()
    for kill in range(30):
        run = tmp_path / str(kill)
        last = killed_after(run, moments.uniform(0, 0.05))
        hidden |= {path.suffix for path in run.iterdir() if path.name.startswith(".")}
        found = newest_whole(run, no_report)
        assert found is not None and value_of(found) >= last
        remove_leftovers(run)
        assert not any(path.name.startswith(".") for path in run.iterdir())
        again = newest_whole(run, no_report)
        assert again is not None and value_of(again) >= last
    assert ".partial" in hidden, "no kill hit a write: the moments prove nothing"


def test_purge_keeps_the_newest_the_named_and_the_only_whole_one(tmp_path: Path) -> None:
    folders = {step: write_checkpoint(tmp_path, step, fill) for step in (1, 2, 3, 4, 5)}
    assert purge(tmp_path, None) == []
    assert purge(tmp_path, 3, [folders[1]]) == [folders[2], folders[3]]
    assert list(RunFolder(tmp_path).checkpoints()) == [1, 4, 5]
    (folders[5] / MANIFEST).unlink()
    assert purge(tmp_path, 1) == [folders[1], folders[5]]
    assert newest_whole(tmp_path, no_report) == folders[4]
    assert purge(tmp_path, 0) == [] and list(RunFolder(tmp_path).checkpoints()) == [4]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("adapter", "checkpoint-x", "checkpoint-1-old", ".hidden", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert RunFolder(tmp_path).checkpoints() == {} and remove_leftovers(tmp_path) == [] and purge(tmp_path, 0) == []
    assert len(list(tmp_path.iterdir())) == 6


def test_json_stays_valid_for_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"nan": float("nan"), "list": [float("inf"), 1.5], "text": "ü"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"nan": None, "list": [None, 1.5], "text": "ü"}
    assert json_ready({1: (2, Path("x"))}) == {"1": [2, "x"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"run.output_dir is .*file.*cannot be written to"):
            check_writable(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_output_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            check_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_safetensors_read_back_as_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, lambda f: fill(f, 5))
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["a"], torch.full((64,), 5.0))
