"""A run stops where it is told to, by a signal or by the clock, and says by which; one rank needs no other."""

from __future__ import annotations

import torch

from dist_subspace.stopping import Stop
from dist_subspace.training.pause import Pause

CPU = torch.device("cpu")


def test_nothing_stops_a_run_that_nobody_tells() -> None:
    pause = Pause(Stop(), None, CPU)
    assert not any(pause() for _ in range(50)) and not pause.told()


def test_a_run_that_is_told_stops_at_once_after_long_pieces() -> None:
    stop = Stop()
    pause = Pause(stop, None, CPU)
    pause._since -= 100  # the first piece of work took so long
    assert not pause()
    stop.tell("SIGTERM")
    assert pause() and stop.reason == "SIGTERM"


def test_the_end_of_the_time_is_a_reason_like_another() -> None:
    stop = Stop()
    assert Pause(stop, 0.0, CPU)()
    assert stop.reason == "the end of training.max_time"
    later = Stop()
    assert not Pause(later, 1000.0, CPU)() and later.reason is None


def test_short_pieces_are_asked_about_seldom_and_all_the_same_in_the_end() -> None:
    stop = Stop()
    pause = Pause(stop, None, CPU)
    for _ in range(2000):
        pause()
    assert pause._every > 64
    stop.tell("SIGTERM")
    assert any(pause() for _ in range(2 * pause._every))
