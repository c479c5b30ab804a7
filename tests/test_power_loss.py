"""A machine may lose its power at any moment: what a run, a merge, an export leave on the disk is whole, or is the former, or is
not there; and what was said to be done is there. The product works once, recorded (disk_log.py); its own readers look at every
disk that POSIX allows."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml

import dist_subspace as dsub
from dist_subspace.api import load_adapted, rewrite_on_base
from dist_subspace.atomic_files import whole_folder
from dist_subspace.checkpoint.store import newest_whole, purge, write_checkpoint
from dist_subspace.interchange.adapter_folder import read_adapter
from dist_subspace.interchange.peft.importing import rewrite_peft
from dist_subspace.run_folder import RunFolder
from dist_subspace.run_folder.manifest import verify
from dist_subspace.run_folder.metrics import read_lines, training_lines
from dist_subspace.run_folder.status import EXIT_OK, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from dist_subspace.training.data.store import read_columns
from dist_subspace.training.run import train
from tests.disk_log import DiskLog, State
from tests.tiny_run import make_model, make_records
from tests.whole_runs import two_kept_configuration

RUN = Path("made", "run")  # below the watched folder, where neither is at first
OUTPUTS = ("merged", "saved", "exported", "imported", "rewritten")
UNSURE = ("metrics.jsonl", "loss.png")  # a curve that grows line by line, and its picture


@dataclass(frozen=True)
class Found:
    """A disk after a crash, as files."""

    state: State
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / RUN

    @property
    def saved(self) -> list[int]:
        """The steps that were said to be saved, in the order in which it was said."""
        return [int(found[1]) for text in self.state.said if (found := re.match(r"saved .*checkpoint-(\d+)$", text))]

    @property
    def aside(self) -> list[Path]:
        return list(self.run.glob("set-aside-*"))

    def has_said(self, start: str) -> bool:
        return any(text.startswith(start) for text in self.state.said)


class Heard:
    """The screen, which tells the log what is said on it."""

    def __init__(self, log: DiskLog, screen: TextIO) -> None:
        self._log, self._screen, self._line = log, screen, ""

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            if line.startswith(("saved ", "warning: checkpoint-")):
                self._log.say(line.rstrip())
        return self._screen.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


def work(sources: Path, disk: Path, log: DiskLog) -> None:
    """A run; another one that goes on from its second step; and all that can be made of an adapter."""
    config = two_kept_configuration(sources, disk / RUN)
    assert train(config) == EXIT_OK
    log.say("finished")
    config["checkpoint"]["resume"] = str(disk / RUN / "checkpoint-2")
    config["training"]["learning_rate"] = 0.02
    assert train(config) == EXIT_OK
    log.say("finished again")
    model = load_adapted(disk / RUN / "adapter", sources / "model")
    dsub.merge(model, disk / "made" / "merged", max_shard_bytes=20_000, report=None)
    log.say("done merged")
    dsub.save_adapter(model, disk / "made" / "saved")
    log.say("done saved")
    dsub.export_peft(disk / RUN / "adapter", disk / "made" / "exported", report=None)
    log.say("done exported")
    rewrite_on_base(disk / "made" / "exported", disk / "made" / "imported", sources / "model")
    log.say("done imported")
    rewrite_peft(disk / "made" / "exported", disk / "made" / "rewritten")
    log.say("done rewritten")


def matters(name: str) -> bool:
    """A hidden name is nobody's but the product's own; one that was set aside counts for as long as there is no other."""
    return not name.startswith(".") or name.endswith(".replaced")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Found]]:
    sources, disk = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("disk")
    make_model(sources / "model", layers=1)
    make_records(sources / "train.jsonl", 24)
    screen = sys.stdout
    with DiskLog(disk) as log:
        sys.stdout = Heard(log, screen)  # type: ignore[assignment]
        try:
            work(sources, disk, log)
        finally:
            sys.stdout = screen
    places = tmp_path_factory.mktemp("states")
    found = [Found(state, state.write(places / str(n))) for n, state in enumerate(log.states(matters))]
    yield [
        *found,
        Found(State({}, (), found[-1].state.said), disk),
    ]  # the last is the disk itself, with all that was done


def test_what_is_under_its_name_is_on_disk_to_the_last_byte(disks: list[Found]) -> None:
    for found in disks:
        torn = {path for path in found.state.uncertain if not path.endswith(UNSURE)}
        if not found.has_said("warning: checkpoint-"):  # a copy of a file that is still in its place
            torn -= {path for path in torn if "set-aside-" in path}
        assert not torn


def test_every_checkpoint_is_whole_and_none_that_was_said_to_be_saved_is_lost(disks: list[Found]) -> None:
    """Where it is the last, or among those that `save_total_limit` keeps; what it cannot be used without is there with it."""
    assert disks[-1].saved == [1, 2, 3, 4, 3, 4]
    for found in disks:
        whole = RunFolder(found.run).checkpoints()
        for folder in (*whole.values(), *(f for aside in found.aside for f in RunFolder(aside).checkpoints().values())):
            assert verify(folder) is None
            assert read_adapter(folder).tensors
        if not found.saved:
            continue
        anywhere = {path.name for path in found.run.rglob("checkpoint-*")}
        newest = newest_whole(found.run, pytest.fail)
        assert newest is not None
        assert max(whole) >= (2 if found.aside and len(found.saved) == 4 else found.saved[-1])
        assert len(anywhere) >= min(2, len(found.saved)), "an older checkpoint went before the newer one was there"
        best = read_trainer_state(newest).best
        assert best is None or best["step"] in whole
    assert len(RunFolder(disks[-1].run).checkpoints()) == 2


def test_a_run_that_has_finished_has_its_adapter_and_an_adapter_is_whole(disks: list[Found]) -> None:
    first, last = ({path.name for path in found.run.glob("adapter/*")} for found in (at(disks, "finished"), disks[-1]))
    assert first == last and "tokenizer.json" in first
    for found in disks:
        status, adapter = read_status(found.run), found.run / "adapter"
        assert status is not None or not (found.run / "status.json").exists()
        assert status is not None or not found.saved
        if status is not None and status["state"] == "finished":
            assert adapter.is_dir()
            assert status["step"] == 4
        if adapter.is_dir():
            assert {path.name for path in adapter.iterdir()} == last and read_adapter(adapter).tensors
        if found.has_said("finished again"):
            assert status is not None and status["state"] == "finished"


def test_the_configuration_and_the_lines_of_every_saved_step_are_there(disks: list[Found]) -> None:
    for found in disks:
        if (found.run / "config.yaml").exists():
            config = yaml.safe_load((found.run / "config.yaml").read_text())
            assert config["training"]["max_steps"] == 4
        if found.saved:
            assert (found.run / "config.yaml").exists()
        newest = newest_whole(found.run, pytest.fail)
        if newest is not None:
            lines = [line.step for line in training_lines(read_lines(found.run))]
            assert lines[: read_trainer_state(newest).step] == list(range(1, read_trainer_state(newest).step + 1))


def test_what_is_set_aside_is_whole_under_its_old_name_or_its_new_one(disks: list[Found]) -> None:
    assert any(found.aside for found in disks)
    for found in disks:
        if found.has_said("warning: checkpoint-"):
            (aside,) = found.aside
            assert {path.name for path in aside.iterdir()} == {
                "checkpoint-4",
                "adapter",
                "metrics.jsonl",
                "config.yaml",
            }
            assert len(training_lines(read_lines(aside))) == 4
            assert yaml.safe_load((aside / "config.yaml").read_text())["training"]["learning_rate"] == 0.01
        elif found.has_said("finished"):
            homes = [found.run, *found.aside]
            assert any((home / "checkpoint-4").is_dir() for home in homes)
            assert any((home / "adapter").is_dir() for home in homes)


def test_a_store_of_tokens_or_factors_is_whole_or_absent(disks: list[Found]) -> None:
    (tokens,) = (disks[-1].run / "tokens").iterdir()
    factors = {path.name: path.read_bytes() for path in (disks[-1].run / "factors").iterdir()}
    assert factors
    for found in disks:
        for folder in (found.run / "tokens").glob("*"):
            assert read_columns(folder) is not None
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
                p.name: p.read_bytes() for p in tokens.iterdir()
            }
        kept = {path.name: path.read_bytes() for path in (found.run / "factors").glob("*")}
        assert kept.items() <= factors.items()
        if found.saved:
            assert kept == factors


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_made_of_an_adapter_is_whole_or_absent_and_there_once_it_is_said(
    output: str, disks: list[Found]
) -> None:
    held = contents(disks[-1].folder / "made" / output)
    assert len(held) > 3 and (output != "merged" or "model.safetensors.index.json" in held)
    for found in disks:
        now = contents(found.folder / "made" / output)
        if found.has_said(f"done {output}"):
            assert now == held
        elif output == "saved":  # a folder that others may have files in: its configuration comes last
            assert "adapter_config.json" not in now or now == held
            assert now.items() <= held.items()
        else:
            assert not now or now == held


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at(disks: list[Found], said: str) -> Found:
    """The last disk before anything else was said than this."""
    return [found for found in disks if found.state.said and found.state.said[-1] == said][-1]


def fill(folder: Path, value: str) -> None:
    (folder / "below").mkdir()
    for name in ("file", "below/file"):
        (folder / name).write_text(value)


def test_a_checkpoint_that_is_written_again_or_deleted_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """With folders in it, and one in the place of another of its step."""
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    with DiskLog(run.parent) as log:
        for step, value in ((3, "old"), (3, "new"), (4, "later")):
            write_checkpoint(run, step, lambda folder, value=value: fill(folder, value))  # type: ignore[misc]
            log.say(value)
        purge(run, 1)
        log.say("purged")
    order = ("old", "new", "later")
    for number, state in enumerate(log.states(matters)):
        home = state.write(tmp_path / str(number)) / "run"
        for folder in RunFolder(home).checkpoints().values():
            assert verify(folder) is None and (folder / "below" / "file").exists()
        newest = newest_whole(home, pytest.fail)
        told = [order.index(text) for text in state.said if text in order]
        if told:
            assert newest is not None and order.index((newest / "file").read_text()) >= max(told)
        if "purged" in state.said:
            assert [path.name for path in RunFolder(home).checkpoints().values()] == ["checkpoint-4"]


def test_a_folder_in_the_place_of_another_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "disk" / "out"
    target.parent.mkdir()
    with DiskLog(target.parent) as log:
        for value in ("old", "new"):
            with whole_folder(target, replace=True) as hidden:
                fill(hidden, value)
            log.say(value)
    for number, state in enumerate(log.states(matters)):
        home = state.write(tmp_path / str(number))
        place = home / "out" if (home / "out").exists() else home / ".out.replaced"
        held = contents(place)
        assert not held or set(held) == {"file", "below/file"}
        assert len(set(held.values())) == min(1, len(held))
        assert held or not state.said
        assert "new" not in state.said or held["file"] == b"new"
