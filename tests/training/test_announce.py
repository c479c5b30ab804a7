"""What takes long says what it is; what does not stays silent."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dist_subspace.report.quantities import bytes_text
from dist_subspace.training.announce import announced
from dist_subspace.training.display import Display


def test_only_what_takes_long_speaks_while_it_goes_on_and_when_it_is_over() -> None:
    said: list[str] = []
    with announced("a short thing", said.append, silence=5.0):
        pass
    assert said == []
    with announced("a long thing", said.append, silence=0.05):
        time.sleep(0.5)
        assert said == ["a long thing ..."]
    assert len(said) == 2 and said[1].startswith("a long thing: done in 0.")
    with announced("a long thing", said.append, silence=0.05, over=False):
        time.sleep(0.5)
    assert said[2:] == ["a long thing ..."]


def test_what_is_over_in_time_is_not_spoken_of_later() -> None:
    said: list[str] = []
    with announced("a short thing", said.append, silence=0.2):
        pass
    with pytest.raises(RuntimeError), announced("a thing that fails", said.append, silence=0.2):
        raise RuntimeError
    time.sleep(0.6)
    assert said == []


def test_a_log_file_hears_of_a_long_load_every_half_minute() -> None:
    now, file = [0.0], io.StringIO()
    display = Display(True, 4, Console(file=file, width=120), clock=lambda: now[0])
    with display.loading("reading the model") as progress:
        for done in range(1, 101):
            now[0] += 1.0
            progress(done, 100)
    counted = [line for line in file.getvalue().splitlines() if " of 100" in line]
    assert counted == [
        f"reading the model: {done} of 100, {left} left" for done, left in ((31, "1:09"), (62, "0:38"), (93, "0:07"))
    ]


def test_bytes_are_shown_as_bytes() -> None:
    now, file = [0.0], io.StringIO()
    display = Display(True, 4, Console(file=file, width=120), clock=lambda: now[0])
    with display.loading("reading the model", bytes_text) as progress:
        progress(0, 3 << 30)
        now[0] += 40.0
        progress(1 << 30, 3 << 30)
    assert "reading the model: 1.0 GiB of 3.0 GiB, 1:20 left" in file.getvalue().splitlines()
