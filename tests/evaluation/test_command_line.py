"""Every option of the command reaches the evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dist_subspace.cli import main
from dist_subspace.evaluation import command
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.choices import AskedChoices
from dist_subspace.evaluation.command_line import evaluate

EVERY = Asked(
    target="runs/x",
    overrides=["model.storage=nf4"],
    base="m",
    data="d.jsonl",
    metrics=("loss", "f1"),
    choices=AskedChoices(("yes", "no, it is not"), "choices", "gold"),
    answer_regex="(.)",
    max_new_tokens=3,
    batch_size=4,
    limit=5,
    compare_base=True,
    predictions="p.jsonl",
    as_json=True,
    output="f.json",
    tasks=("a", "b"),
    tasks_folder="t",
    num_fewshot=0,
)
ARGUMENTS = (
    *("runs/x", "model.storage=nf4", "--base", "m", "--data", "d.jsonl", "--metrics", " loss , f1,", "--choice", "yes"),
    *("--choice", "no, it is not", "--choices-field", "choices", "--answer-field", "gold", "--answer-regex", "(.)"),
    *("--max-new-tokens", "3", "--batch-size", "4", "--limit", "5", "--compare-base", "--predictions", "p.jsonl"),
    *("--json", "--output", "f.json", "--tasks", "a,b", "--tasks-folder", "t", "--num-fewshot", "0"),
)


def test_every_option_reaches_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def note(asked: Asked) -> int:
        heard.append(asked)
        return 7

    monkeypatch.setattr(command, "evaluate", note)
    assert main(["eval", *ARGUMENTS]) == 7 and heard == [EVERY]
    nothing = Asked()
    assert [f.name for f in dataclasses.fields(Asked) if getattr(EVERY, f.name) == getattr(nothing, f.name)] == []
    assert "Example:" in (evaluate.__doc__ or "")
