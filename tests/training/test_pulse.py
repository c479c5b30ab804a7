"""A word where nobody has spoken for a while, and none where somebody has."""

from __future__ import annotations

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
