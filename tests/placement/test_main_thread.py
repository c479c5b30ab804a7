"""The main thread as another one sees it: in this file, in a library, and inside a collective."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.main_thread import WAITS, where_main_thread_is
from tests.ranks import run_on_ranks


def seen_meanwhile(act: Callable[[], Any], after: float = 0.3) -> str:
    found: list[str] = []
    timer = threading.Timer(after, lambda: found.append(where_main_thread_is()))
    timer.start()
    act()
    timer.join()
    return found[0]


def test_a_main_thread_that_works_is_where_it_is() -> None:
    def work() -> None:
        time.sleep(1.0)

    assert seen_meanwhile(work).startswith("tests/placement/test_main_thread.py:")
    assert "(work)" in seen_meanwhile(work)


def test_one_in_a_library_is_named_by_its_file_too() -> None:
    place = seen_meanwhile(lambda: threading.Event().wait(1.0))
    assert "threading.py:" in place and "(wait)" in place and WAITS not in place


def one_waits_for_the_other() -> str:
    if world().rank == 0:
        return seen_meanwhile(lambda: gather_objects(0))
    place = seen_meanwhile(lambda: time.sleep(1.5))
    gather_objects(0)
    return place


def test_one_in_a_collective_waits_for_the_others_and_the_one_that_is_late_does_not() -> None:
    waiting, working = run_on_ranks(2, one_waits_for_the_other)
    assert waiting.startswith(f"{WAITS}: placement/collectives.py:"), waiting
    assert WAITS not in working, working
    assert "(one_waits_for_the_other)" in working or "(<lambda>)" in working, working
