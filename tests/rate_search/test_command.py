"""The command as a user starts it: alike on any number of ranks, beside a run that it leaves alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.cli import main
from dist_subspace.rate_search.command import budget_text
from tests.forked_ranks import report, run_ranks
from tests.rate_search.searches import refused, searched

RATES = ("--rates", "1e-3,3e-2,1e4", "--steps", "4")


def write_found(file: str, *arguments: str) -> None:
    """On one of several ranks: the exit status, and what rank 0 prints, into a file of this rank's."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["find-lr", *arguments, "--json"])
    Path(f"{file}.{os.environ['RANK']}").write_text(out.getvalue())
    sys.exit(status)


def outcomes(found: dict[str, Any]) -> list[tuple[float, int, bool, str | None]]:
    return [(one["learning_rate"], one["steps"], one["diverged"], one["stopped"]) for one in found["tried"]]


def losses(found: dict[str, Any]) -> list[float]:
    return [found["start_loss"], *(e["eval_loss"] for one in found["tried"] for e in one["evaluations"])]


def test_two_ranks_find_what_one_finds_and_the_run_is_not_touched(home: Path) -> None:
    alone = searched(home / "config.yaml", *RATES, "--output", home / "alone")
    file = str(home / "found")
    arguments = (str(home / "config.yaml"), "deepspeed.preset=zero3", *RATES, "--output", str(home / "together"))
    ended = run_ranks([(write_found, file, *arguments)] * 2, home)
    assert [rank.status for rank in ended] == [0, 0], report(ended)
    first, silent = (Path(f"{file}.{rank}").read_text() for rank in range(2))
    together = json.loads(first)
    assert not silent and outcomes(together) == outcomes(alone) and together["line"] == alone["line"]
    assert alone["line"] == "training.learning_rate=3.0e-2" and outcomes(alone)[2][2]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    for name in ("alone", "together"):
        assert {path.name for path in (home / name).iterdir()} >= {"find-lr.json", "find-lr.png"}
    assert json.loads((home / "alone" / "find-lr.json").read_text()) == alone
    assert not (home / "run").exists() and "7 samples" in ended[0].output


class StopsAt(io.TextIOBase):
    """Standard error that tells its own process to stop when a line of a rate comes."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.told = inner, False

    def write(self, text: str) -> int:
        if "| step 2 |" in text and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return int(self.inner.write(text))

    def flush(self) -> None:
        self.inner.flush()


def stopped_after_a_rate(*arguments: str) -> None:
    sys.stderr = StopsAt(sys.stderr)  # type: ignore[assignment]
    sys.exit(main(["find-lr", *arguments]))


def test_ranks_that_are_stopped_leave_in_step_and_say_the_best_so_far(home: Path) -> None:
    arguments = (str(home / "config.yaml"), "deepspeed.preset=zero2", "--rates", "1e-3,2e-2,3e-2", "--steps", "4")
    ended = run_ranks([(stopped_after_a_rate, *arguments, "--output", str(home / "stopped"))] * 2, home)
    assert [rank.status for rank in ended] == [75, 75], report(ended)
    said = "interrupted by signal SIGTERM; the best so far is training.learning_rate=1.0e-3, held-out loss "
    assert said in ended[0].output and "after 2 steps; the same command begins anew" in ended[0].output
    assert not (home / "stopped" / "find-lr.json").exists()


REFUSALS = [
    (["data.eval=null"], r"data\.eval is null, and learning rates are compared by the loss on held-out data"),
    (["--rates", "1e-3"], r"--rates is '1e-3'; accepted: two or more different positive numbers"),
    (["--steps", "2"], r"--steps is 2 for 7 rates"),
    (["--output", "{home}/run", "run.output_dir={home}/run"], r"which is a run's folder"),
    (["training.learning_rat=1"], r"training\.learning_rat is no key of the configuration"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS)
def test_what_cannot_be_searched_is_refused_in_one_sentence(home: Path, arguments: list[str], sentence: str) -> None:
    said = refused(home / "config.yaml", *(argument.format(home=home) for argument in arguments))
    assert re.search(sentence, said), said


def test_the_budget_counts_the_steps_that_each_rung_adds() -> None:
    begins, ends = "7 to step 20, 4 to step 40, 2 to step 80: at most 300 steps (0.5 s each) ", "(2 s each), about 2:56"
    assert budget_text(7, [20, 40, 80], 0.5, 2.0, 100) == f"{begins}and 13 evaluations of 100 samples {ends}"
