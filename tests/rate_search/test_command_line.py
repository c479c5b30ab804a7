"""The command explains itself, and knows its options."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_subspace.cli import app, main


def test_an_option_that_is_not_there_is_an_error_of_usage(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find-lr", str(home / "config.yaml"), "--rate", "1e-3"]) == 2
    assert "No such option: --rate" in capsys.readouterr().err


def test_help_ends_with_an_example_and_says_how_several_processes_do_it() -> None:
    shown = " ".join(CliRunner().invoke(app, ["find-lr", "--help"]).output.split())
    assert "Example: dist-subspace find-lr my.yaml" in shown and "torchrun -m dist_subspace find-lr" in shown
    assert all(option in shown for option in ("--rates", "--steps", "--eval-samples", "--output", "--json"))
