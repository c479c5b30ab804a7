"""A word where nobody has spoken for a while, and none where somebody has."""

from __future__ import annotations

import math
import time

from dist_subspace.training.pulse import Pulse


def waited(said: list[float], count: int) -> bool:
    until = time.monotonic() + 20
    while len(said) < count and time.monotonic() < until:
        time.sleep(0.01)
    return len(said) >= count


def test_it_speaks_again_and_again_until_it_is_closed() -> None:
    said: list[float] = []
    pulse = Pulse(lambda: said.append(time.monotonic()), first=0.05, every=0.2)
    try:
        assert waited(said, 3)
    finally:
        pulse.close()
    assert said[1] - said[0] >= 0.19 and said[2] - said[1] >= 0.19
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count


def test_who_speaks_puts_it_off() -> None:
    said: list[float] = []
    pulse = Pulse(lambda: said.append(time.monotonic()), first=0.6, every=0.6)
    for _ in range(12):
        time.sleep(0.1)
        pulse.touch()
    assert said == []
    pulse.close()


def test_who_shall_speak_once_speaks_once() -> None:
    said: list[float] = []
    pulse = Pulse(lambda: said.append(time.monotonic()), first=0.05, every=math.inf)
    assert waited(said, 1)
    time.sleep(0.2)
    assert pulse._thread.is_alive() and len(said) == 1
    pulse.close()
    assert not pulse._thread.is_alive()
