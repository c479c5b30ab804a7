"""A stop is heard everywhere, interrupts what may be interrupted, and nothing else; handlers go back to whoever had them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest

from dist_subspace.stopping import STOP, Interrupted, listening
from tests.ranks import ROOT


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_interrupts_a_block_where_nothing_is_lost_and_no_other(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with listening() as stop:
        with stop.interruptible():  # something may be lost here
            tell(number)
            time.sleep(1.0)
        assert stop.reason == f"signal {number.name}"
        with stop.leavable(), pytest.raises(Interrupted, match=number.name), stop.interruptible():
            raise AssertionError("told before: the block does not begin")
    assert {n: signal.getsignal(n) for n in before} == before
    with listening() as stop:
        assert stop.reason is None, "what an earlier run was told is over"
        began = time.monotonic()
        with stop.leavable(), pytest.raises(Interrupted), stop.interruptible():
            tell(number)
            time.sleep(30)
        assert time.monotonic() - began < 5


def test_what_a_stop_interrupts_cleans_up_in_peace_and_the_first_reason_stays() -> None:
    cleaned = []
    with listening() as stop, stop.leavable(), pytest.raises(Interrupted, match="SIGTERM"), stop.interruptible():
        try:
            tell(signal.SIGTERM)
            time.sleep(30)
        finally:
            tell(signal.SIGUSR1)
            time.sleep(0.3)
            cleaned.append(stop.reason)
    assert cleaned == ["signal SIGTERM"]


def test_an_inner_block_that_is_over_does_not_end_the_outer_one() -> None:
    with listening() as stop, stop.leavable(), pytest.raises(Interrupted):
        with stop.leavable(), stop.interruptible():
            pass
        with stop.interruptible():
            with stop.interruptible():
                pass
            tell(signal.SIGTERM)
            time.sleep(2)
    with listening() as stop:
        with stop.leavable():
            pass
        with stop.interruptible():  # what is left behind leaves nothing leavable either
            tell(signal.SIGTERM)
            time.sleep(0.5)
        assert stop.reason == "signal SIGTERM"


def test_no_handler_on_the_way_takes_a_stop_for_a_fault() -> None:
    with listening() as stop, stop.leavable(), pytest.raises(Interrupted), stop.interruptible():
        try:
            tell(signal.SIGTERM)
            time.sleep(30)
        except Exception as error:
            raise AssertionError("taken for an error") from error


def test_what_another_thread_learns_interrupts_the_main_one() -> None:
    def look() -> None:
        STOP.tell("another rank")

    with listening() as stop, stop.watching(look), stop.leavable(), pytest.raises(Interrupted, match="another rank"):
        with stop.interruptible():
            time.sleep(30)


def test_helper_processes_end_by_their_own_signals_and_tell_nobody() -> None:
    with listening() as stop:
        child = get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        child.terminate()
        child.join(10)
        time.sleep(0.6)
        assert child.exitcode == -signal.SIGTERM
        assert stop.reason is None


LONG_CALL = """
import ctypes, sys
from dist_subspace import stopping
stopping.PATIENCE = 1.0
def last_words(reason):
    print(reason)
    return 75
with stopping.listening() as stop:
    stop.leave = last_words
    if sys.argv[1] == "leavable":
        with stop.leavable():
            print("ready", flush=True)
            while True:
                ctypes.CDLL(None).sleep(60)  # no Python runs in the main thread meanwhile, and signals do not end it for long
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(60)
"""


def started(kind: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL, kind], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_where_nothing_is_lost_a_process_that_hears_nothing_leaves_before_its_launcher_kills_it() -> None:
    process = started("leavable")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "signal SIGTERM\n"
    assert process.returncode == 75


def test_only_a_second_ctrl_c_of_a_person_ends_a_process_that_has_something_to_save() -> None:
    process = started("not leavable")
    for number in (
        signal.SIGINT,
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a launcher passes on what the terminal sent, at once
        process.send_signal(number)
        time.sleep(0.3)
    time.sleep(1.5)
    assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
