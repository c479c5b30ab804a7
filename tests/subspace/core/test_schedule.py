"""The phases of a plan: when it decides, how far it is, and which lengths fit into a run."""

from __future__ import annotations

from typing import Any

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.subspace.core.schedule import Phases, Schedule, phase_options, phases_of
from dist_subspace.subspace.core.spec import Settings

UNSET = {"warmup_steps": None, "final_steps": None, "interval": None}


def options(**given: Any) -> dict[str, Any]:
    return UNSET | given


def test_lengths_that_are_unset_are_shares_of_the_run() -> None:
    assert phases_of(UNSET, 100, decisions=20) == Phases(10, 30, 5, 100)
    assert phases_of(UNSET, 8, decisions=20) == Phases(0, 2, 1, 8)
    given = options(warmup_steps=0, final_steps=0, interval=7)
    assert phases_of(given, 100, decisions=20) == Phases(0, 0, 7, 100)


def test_decisions_are_made_between_the_phases_at_multiples_of_the_interval() -> None:
    phases = Phases(warmup=4, final=3, interval=2, total=14)
    assert [step for step in range(1, 15) if phases.decides(step)] == [6, 8, 10]
    assert [step for step in range(1, 15) if phases.at_end(step)] == [12, 13, 14]
    assert (phases.progress(4), phases.progress(11)) == (0.0, 1.0)
    assert Phases(4, 3, 1, 14).decides(11) and not Phases(4, 3, 1, 14).decides(4)


def test_phases_that_leave_no_step_are_refused() -> None:
    given = options(warmup_steps=6, final_steps=4)
    assert phases_of(given, 11, 1) == Phases(6, 4, 11, 11)
    message = (
        r"subspace\.options\.warmup_steps is 6 and subspace\.options\.final_steps is 4, which leaves no step of max_steps "
        "10 between; accepted: a sum below it"
    )
    with pytest.raises(UsageError, match=message):
        phases_of(given, 10, 1)


def test_the_options_take_what_phases_are_made_of() -> None:
    made = phase_options("cut", 20)
    assert set(made) == set(UNSET) and all(option.default is None for option in made.values())
    assert made["warmup_steps"].accepts(0) and not made["interval"].accepts(0)
    assert "max_steps // 20" in made["interval"].help and "first cut" in made["warmup_steps"].help


def test_a_plan_that_says_nothing_asks_for_nothing_and_keeps_nothing() -> None:
    plan = Schedule({}, Settings())
    plan.check(1)
    assert not plan.uses_gradients(1, 10) and plan.reads_parameters(1, 10) and not plan.decomposes(1, 10)
    assert plan.state() == {} and plan.tensors() == {} and plan.late_parameters() == []
    with pytest.raises(TypeError, match="Schedule decides nothing"):
        plan.advance(1, 10, {})
