"""Silence is what was listened to: a clock of the test's own."""

from __future__ import annotations

from dist_subspace.placement.silence import Silence


def test_silence_grows_with_each_look_and_ends_with_a_new_sign() -> None:
    now = [100.0]
    silence = Silence(longest=4.0, clock=lambda: now[0])
    assert silence.look("a") == 0.0
    for seconds in (2.0, 4.0):
        now[0] += 2.0
        assert silence.look("a") == silence.seconds == seconds
    now[0] += 2.0
    assert silence.look("b") == 0.0


def test_a_pause_of_the_listener_itself_counts_as_one_look() -> None:
    now = [0.0]
    silence = Silence(longest=4.0, clock=lambda: now[0])
    silence.look("a")
    now[0] += 3600.0
    assert silence.look("a") == 4.0
    now[0] += 1.0
    assert silence.look("a") == 5.0
