"""LoRA-Dash's schedule: it switches once, after the warm-up, and remembers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve
from dist_subspace.subspace.schedules.switching import SwitchingSchedule
from tests.subspace.golden import layer


def schedule(**options: Any) -> SwitchingSchedule:
    return SwitchingSchedule({}, resolve(SubspaceConfig(method="lora-dash", options=options)).settings)


def switches(plan: SwitchingSchedule, max_steps: int, first: int = 1) -> list[int]:
    found = []
    for step in range(first, max_steps + 1):
        if plan.decomposes(step, max_steps):
            found.append(step)
        assert plan.advance(step, max_steps, {}) == []
    return found


@pytest.mark.parametrize(("max_steps", "expected"), [(1000, 100), (300, 100), (30, 10), (3, 1), (1, 1)])
def test_it_switches_once_after_100_steps_or_a_third_of_a_shorter_run(max_steps: int, expected: int) -> None:
    assert switches(schedule(), max_steps) == [expected]


def test_a_given_warm_up_is_kept_to() -> None:
    assert switches(schedule(warmup_steps=25), 30) == [25]


def test_a_step_that_was_left_out_does_not_lose_the_switch() -> None:
    assert switches(schedule(warmup_steps=5), 30, first=8) == [8]


def test_directions_that_came_with_an_adapter_are_not_chosen_anew() -> None:
    """The strengths that came with them belong to those."""
    part: Any = layer("lora-dash", rank=2, options={"directions": 2})
    settings = resolve(SubspaceConfig(method="lora-dash")).settings
    assert SwitchingSchedule({"layer": part}, settings).decomposes(10, 30)
    part.load_file_tensors({**part.file_tensors(), "dash_U": torch.ones(3, 2), "dash_V": torch.ones(2, 4)})
    plan = SwitchingSchedule({"layer": part}, settings)
    assert not any(plan.decomposes(step, 30) for step in range(1, 31))


def test_phase_and_step_are_its_state() -> None:
    plan = schedule(warmup_steps=5)
    assert plan.state() == {"phase": 1, "switched": None, "begun": None}
    switches(plan, 7)
    assert plan.state() == {"phase": 2, "switched": 5, "begun": None}
    plan.begun = 5  # as the optimizer's counters said
    again = schedule(warmup_steps=5)
    again.restore(plan.state(), {})
    assert (again.switched, again.begun) == (5, 5)
    assert switches(again, 30, first=8) == []


def test_a_warm_up_that_fills_the_run_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"warmup_steps is 30, which leaves no step of max_steps 30 .* accepted: below 30"
    ):
        schedule(warmup_steps=30).check(30)
    schedule(warmup_steps=29).check(30)
    for steps in range(1, 5):
        schedule().check(steps)
