"""Progress says what is done and what is left, on a terminal and elsewhere."""

from __future__ import annotations

import io

from dist_subspace.talking.progress import Progress


def test_the_time_left_follows_from_what_was_done_here() -> None:
    progress = Progress("answering", "prompts", stream=io.StringIO())
    progress.began = (100.0, 40)
    assert progress.text(60, 1000, 110.0) == "answering: 60 of 1,000 prompts, 7 min 50 s left"
    assert progress.text(1000, 1000, 130.0) == "answering: 1,000 of 1,000 prompts in 30 s"
    assert progress.text(40, 1000, 110.0) == "answering: 40 of 1,000 prompts"


def test_elsewhere_a_line_comes_each_while_and_the_last_at_the_end() -> None:
    times = iter([0.0, 10.0, 31.0, 32.0, 40.0])
    stream = io.StringIO()
    progress = Progress("answering", "prompts", stream=stream, clock=lambda: next(times))
    for done in (0, 1, 2, 3, 4):
        progress(done, 4)
    progress.close()
    assert stream.getvalue() == "answering: 2 of 4 prompts, 31 s left\nanswering: 4 of 4 prompts in 40 s\n"
