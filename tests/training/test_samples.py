"""What is written of answers to prompts, and which configurations have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.run_folder import RunFolder
from dist_subspace.training.samples import Sample, check_prompts, write_samples


def sample(step: int, prompt: str = "p", answer: str = "ä\n") -> Sample:
    return Sample(step, prompt, answer, "stop")


def written(run: RunFolder) -> list[tuple[int, str, str]]:
    lines = map(json.loads, run.samples.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["prompt"], line["answer"]) for line in lines]


def test_answers_stand_behind_those_of_earlier_steps_and_in_the_place_of_later_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (0, 5, 10):
        write_samples(run, [sample(step), sample(step, "q")])
    assert written(run) == [(step, prompt, "ä\n") for step in (0, 5, 10) for prompt in ("p", "q")]
    write_samples(run, [sample(5, answer="again")])  # of a run that went on from step 4
    assert written(run) == [(0, "p", "ä\n"), (0, "q", "ä\n"), (5, "p", "again")]
    run.samples.write_text("[1]\nhalf")
    write_samples(run, [sample(7)])
    assert written(run) == [(7, "p", "ä\n")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train": "t.jsonl"}}, "but data.eval is null"),
        ({"model": {"path": "m", "task": "classification"}}, "model.task 'classification' writes no answers"),
    ],
)
def test_prompts_that_nobody_would_answer_are_refused(changes: dict[str, Any], words: str) -> None:
    good = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "eval": 0.1}, "run": {"sample_prompts": "one"}}
    check_prompts(load_config(good))
    with pytest.raises(UsageError, match="run.sample_prompts has 1, .*" + words):
        check_prompts(load_config(good | changes))
    check_prompts(load_config({**good, **changes, "run": {}}))
