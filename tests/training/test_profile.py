"""A profile that cannot be made or written is said, and ends no run; what was measured is written where a run is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dist_subspace.training.profile import BEFORE, Profile, part, parts_text


def stepped(profile: Profile, count: int) -> None:
    for _ in range(count):
        with part("forward"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step()


def test_what_was_measured_is_written_when_the_run_ends_before_all_of_it(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(50, tmp_path / "profile", torch.device("cpu"), said.append)
    stepped(profile, BEFORE + 3)
    profile.close()
    profile.close()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "step/forward" and event["cat"] == "user_annotation" for event in events) == 3
    assert len(said) == 1 and said[0].startswith(f"profile of 3 steps in {tmp_path / 'profile'}:")


def test_a_run_that_ends_before_the_first_measured_step_writes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(5, tmp_path / "profile", torch.device("cpu"), said.append)
    stepped(profile, BEFORE)
    profile.close()
    assert said == [] and not (tmp_path / "profile").exists()


def test_a_folder_that_cannot_be_written_is_said_and_nothing_more(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "profile").write_text("a file")
    profile = Profile(1, tmp_path / "profile", torch.device("cpu"), said.append)
    stepped(profile, BEFORE + 1)
    assert len(said) == 1 and said[0].startswith("run.profile: nothing could be written (")


def test_the_parts_of_a_step_have_their_shares() -> None:
    rows = parts_text({"data": 0.0, "forward": 1.0, "backward": 3.0}).splitlines()
    assert [row.split() for row in rows] == [
        ["data", "0.0000", "s", "a", "step", "0.0%"],
        ["forward", "1.0000", "s", "a", "step", "25.0%"],
        ["backward", "3.0000", "s", "a", "step", "75.0%"],
    ]
