"""The time that is left is that which a run then takes."""

from __future__ import annotations

import math

import pytest

from dist_subspace.training.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_after_every_step_but_the_first_the_time_left_is_what_the_run_then_takes() -> None:
    """A first step of 20 s, then 1 s each; an evaluation of 30 s before the first and behind each tenth, a checkpoint of 2 s
    behind each fifteenth; both behind the last."""
    clock, total = Clock(), 44
    pace = Pace(total, {"evaluation": 10, "checkpoint": 15}, clock)
    pace.start(0)
    told: list[tuple[float, float]] = []

    def aside(kind: str, seconds: float) -> None:
        with pace.aside(kind):
            clock.now += seconds

    assert math.isinf(pace.seconds) and pace.text() == "-:-- left"
    aside("evaluation", 30.0)
    for step in range(1, total + 1):
        clock.now += 20.0 if step == 1 else 1.0
        pace.step(step)
        if step == 1:
            assert pace.text() == "at most 16:50 left", (
                "43 steps of 20 s, 5 evaluations; a checkpoint has not been seen"
            )
        if step % 10 == 0 or step == total:
            aside("evaluation", 30.0)
        if step % 15 == 0 or step == total:
            aside("checkpoint", 2.0)
        told.append((clock.now, pace.seconds))
    for step, (then, left) in enumerate(told[:-1], start=1):
        unseen = 0.0 if step >= 15 else 3 * 2.0
        if step > 1:
            assert left == pytest.approx(clock.now - then - unseen), step
    assert told[-1][1] == 0.0 and pace.text() == "0:00 left"


def test_a_run_that_goes_on_counts_its_own_steps() -> None:
    clock = Clock()
    pace = Pace(100, {"evaluation": None}, clock)
    pace.start(90)
    for step in (91, 92, 93):
        clock.now += 4.0
        pace.step(step)
    assert pace.seconds == pytest.approx(28.0)
    with pace.aside("evaluation"):
        clock.now += 5.0
    assert pace.seconds == pytest.approx(33.0), "once more, at the end"
    with pace.aside("profile"):
        clock.now += 50.0
    clock.now += 4.0
    pace.step(94)
    assert pace.seconds == pytest.approx(29.0), "what is done once is neither a step nor will come again"


def test_a_machine_that_gets_slower_is_believed() -> None:
    clock = Clock()
    pace = Pace(1000, {}, clock)
    pace.start(0)
    for step in range(1, 401):
        clock.now += 1.0 if step <= 200 else 3.0
        pace.step(step)
    assert pace.seconds == pytest.approx(600 * 3.0)
