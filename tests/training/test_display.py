"""On a terminal a live line that leaves it sane; in a file plain lines; on other ranks nothing."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.training.display import Display
from tests.ranks import ROOT
from tests.step_records import step_record, unknown_record


def record(step: int) -> StepRecord:
    return step_record(
        step,
        loss=2.5,
        learning_rate=2e-4,
        grad_norm=0.5123,
        tokens_per_second=12345.6,
        peak_memory_bytes=3 << 30,
    )


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")


def seconds() -> Iterator[float]:
    second = 0.0
    while True:
        yield second
        second += 10.0


def whole_run(display: Display) -> None:
    with display:
        display.show_config(["model: {storage: nf4}"], "run/config.yaml")
        display.show_summary([("[q_proj]", 1000, 99000, 2048), ("head", 0, 0, 1024)], title="method lora")
        with display.loading("reading the model") as progress:
            progress(1, 2)
        display.start(0)
        for step in (1, 2, 3, 4):
            display.advance(step)
            if step % 2 == 0:
                display.update(record(step))
        display.notice("saved [checkpoint-4]")
        display.warning("step 3 skipped")
        display.evaluation(Evaluation(4, {"eval_loss": 1.25, "eval_accuracy": 0.5}))
        display.finish("finished", adapter=Path("run/adapter"), curve="run/loss.png")


def plain(total_steps: int = 4) -> tuple[Display, io.StringIO]:
    file, ticks = io.StringIO(), seconds()
    return Display(True, total_steps, Console(file=file, width=120), clock=lambda: next(ticks)), file


def test_a_file_gets_plain_lines_one_for_each_logged_step() -> None:
    display, file = plain()
    whole_run(display)
    text = file.getvalue()
    assert not CONTROL.search(text)
    logged = [line for line in text.splitlines() if line.startswith("step ")]
    figures = "epoch 1.00 | loss 2.5000 | lr 2.00e-04 | grad norm 0.512 | 12,346 tokens/s | 3.0 GiB"
    assert [line.rpartition(" | ")[0] for line in logged] == [f"step 2/4 | {figures}", f"step 4/4 | {figures}"]
    assert logged[0].endswith(" left") and logged[1].endswith("| 0:00 left")
    for part in ("storage: nf4", "[q_proj]", "1,000", "99,000", "2.0 KiB", "1 % trained", "3.0 KiB", "method lora"):
        assert part in text, part
    for part in ("saved [checkpoint-4]", "warning: step 3", "accuracy 0.5000", "run/adapter", "run/loss.png"):
        assert part in text, part


def test_time_left_follows_from_the_steps_since_the_start() -> None:
    file, now = io.StringIO(), [100.0]
    display = Display(True, 100, Console(file=file, width=120), clock=lambda: now[0])
    display.start(50)
    now[0] += 300.0
    display.update(record(60))
    assert "0:20:00 left" in file.getvalue() or "20:00 left" in file.getvalue()


def test_a_loss_that_is_no_number_is_shown_as_such() -> None:
    display, file = plain()
    display.start()
    display.update(unknown_record(1))
    display.update(unknown_record(2, loss=float("nan")))
    assert file.getvalue().count("loss nan") == 2


def test_other_ranks_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    whole_run(Display(False, 4))
    assert capfd.readouterr() == ("", "")


# The package's own __init__ imports torch and transformers, which take seconds and print nothing: left out here.
PROGRAM = """
import sys, types
package = types.ModuleType("dist_subspace")
package.__path__ = [sys.argv[2]]
sys.modules["dist_subspace"] = package
from dist_subspace.training.display import Display
from tests.training.test_display import record, whole_run
if sys.argv[1] == "whole":
    whole_run(Display(True, 4))
else:
    display = Display(True, 4)
    display.start()
    display.update(record(1))
    if sys.argv[1] == "closed":
        with display:
            raise RuntimeError("boom")
    raise RuntimeError("boom")
"""


def on_terminal(kind: str) -> str:
    """What a real terminal of 80 columns receives."""
    main, side = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind, str(ROOT / "dist_subspace")],
        stdout=side,
        stderr=side,
        cwd=ROOT,
        env=environment,
        close_fds=True,
    )
    os.close(side)
    received = b""
    while select.select([main], [], [], 300)[0]:
        try:
            block = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        received += block
    child.wait(timeout=120)
    os.close(main)
    return received.decode()


@pytest.fixture(scope="module")
def screens() -> dict[str, str]:
    """The three programs at once: what costs time is the import."""
    found: dict[str, str] = {}

    def show(kind: str) -> None:
        found[kind] = on_terminal(kind)

    threads = [threading.Thread(target=show, args=(kind,)) for kind in ("whole", "closed", "forgotten")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_terminal_gets_a_live_line_and_its_cursor_back(screens: dict[str, str]) -> None:
    text = screens["whole"]
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "4/4" in seen and "100 %" in seen and "12,346 tokens/s" in seen and "run/adapter" in seen
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("kind", ["closed", "forgotten"])
def test_an_exception_leaves_the_cursor_visible(screens: dict[str, str], kind: str) -> None:
    text = screens[kind]
    assert "RuntimeError" in text and "boom" in text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_figure_is_cut_off_however_narrow_the_terminal_is(width: int) -> None:
    file = io.StringIO()
    display = Display(True, 4, Console(file=file, width=width, force_terminal=True, color_system=None), silence=1e9)
    display.evaluation(Evaluation(2, {"eval_loss": 1.25}))
    with display.during("micro-batch", 12):
        display.moved()
        display.update(record(3))
        display._console.print(display._render())
    shown = " ".join(file.getvalue().split())
    for part in (
        "loss 2.5000",
        "epoch 1.00",
        "12,346 tokens/s",
        "3.0 GiB",
        "validation 1.2500 (step 2)",
        "micro-batch: 1 of 12",
    ):
        assert part in shown, part


def test_a_log_file_gets_a_line_where_nothing_else_is_said_and_it_says_what_goes_on() -> None:
    file = io.StringIO()
    display = Display(True, 9, Console(file=file, width=120), silence=0.1)
    display.start()
    display.advance(1, 3.5)
    with display.during("micro-batch", 12):
        display.moved()
        until = time.monotonic() + 20
        while "micro-batch" not in file.getvalue() and time.monotonic() < until:
            time.sleep(0.02)
    display.close()
    said = file.getvalue()
    assert re.match(r"step 1/9 \| loss 3\.5000 \| micro-batch: 1 of 12 \| at most \S+ left\n", said), said
    time.sleep(0.3)
    assert file.getvalue() == said, "a run that is over says nothing more"
