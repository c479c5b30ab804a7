"""Tasks of lm-evaluation-harness: its own figures on PEFT's model, at any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_subspace.evaluation.harness import shared, task_figures
from dist_subspace.placement.collectives import world
from dist_subspace.stopping import STOP, Interrupted
from tests.evaluation.runs import refused, write_figures
from tests.forked_ranks import report, run_ranks, side_by_side
from tests.ranks import run_on_ranks

TASKS = "parity,saying,stories"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind: choices, written answers, and the likelihood of texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"is {n} even?", "label": n % 2, "say": f"say {n % 3}", "text": f"story {n} " * n}
        for n in range(1, 8)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared_keys = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "data.jsonl")},
        "test_split": "train",
        "metadata": {"version": 1.0},
    }
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes, it is", "no"],
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{say}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    for name, task in zip(TASKS.split(","), (choices, written, rolling), strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared_keys, **task}))
    return folder


@pytest.mark.slow
def test_figures_are_those_of_the_harness_on_pefts_model_at_any_number_of_ranks(home: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, home / "run" / "adapter").eval()
    theirs = HFLM(pretrained=peft, tokenizer=AutoTokenizer.from_pretrained(home / "model"), batch_size=3)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(model=theirs, tasks=TASKS.split(","), task_manager=manager, bootstrap_iters=0)["results"]
    arguments = (str(home / "run"), "--tasks", TASKS, "--tasks-folder", str(tasks), "--batch-size", "3")

    def figures(ranks: int, preset: str) -> str:
        call: tuple[Any, ...] = (write_figures, str(home / f"t{ranks}"), *arguments, f"deepspeed.preset={preset}")
        ended = run_ranks([call] * ranks, home, limit=120)
        assert [rank.status for rank in ended] == [0] * ranks, report(ended)
        return Path(f"{home}/t{ranks}.0").read_text()

    cases = ((1, "none"), (2, "zero3"), (3, "zero0"))
    texts = side_by_side(*(lambda ranks=ranks, preset=preset: figures(ranks, preset) for ranks, preset in cases))
    assert texts[1] == texts[0] and texts[2] == texts[0]
    found = json.loads(texts[0])["adapter"]
    values = {f"{task} {name}": m.value for task, of in expected.items() for name, m in task_figures(of).items()}
    assert {name: figure["value"] for name, figure in found.items()} == pytest.approx(values, rel=1e-5)
    assert len(values) == 5


@pytest.mark.slow
def test_tasks_that_cannot_be_measured_are_refused(home: Path, classified: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "lost.yaml").write_text(
        (tasks / "parity.yaml").read_text().replace("task: parity", "task: lost").replace("data.jsonl", "gone.jsonl")
    )
    of_tasks = ("--tasks-folder", tasks)
    assert "(did you mean 'parity'?)" in refused(home / "run", "--tasks", "parrity", *of_tasks)
    assert "whose data cannot be had" in refused(home / "run", "--tasks", "lost", "--tasks-folder", tmp_path)
    assert "whose data cannot be had" in refused(home / "run", "--tasks", "openbookqa")  # of the Hub
    assert "which is no folder" in refused(home / "run", "--tasks", "x", "--tasks-folder", tmp_path / "none")


def test_tasks_are_for_language_models(classified: Path) -> None:
    assert "--tasks is given, and model.task is 'classification'" in refused(classified / "run", "--tasks", "x")


def run_of_ranks() -> tuple[list[int], list[list[int]]]:
    runs: list[list[int]] = []

    def run(batch: list[int]) -> list[int]:
        runs.append(batch)
        return [10 * request + 0 * world().rank for request in batch]

    return shared([3, 1, 5, 4, 2], lambda request: request, 2, run), runs


def test_requests_are_shared_in_batches_that_depend_on_them_alone() -> None:
    alone, batches = run_of_ranks()
    assert (alone, batches) == ([30, 10, 50, 40, 20], [[5, 4], [3, 2], [1]])
    (first, of_first), (second, of_second) = run_on_ranks(2, run_of_ranks)
    assert first == second == alone
    assert (of_first, of_second) == ([[5, 4], [1]], [[3, 2], [1]])  # the last for nothing


def stopped_after_a_batch(told: int) -> int | str:
    """Collective: a rank is told to stop while it runs its first batch; how many this rank has run, or why it ended."""
    runs: list[list[int]] = []

    def run(batch: list[int]) -> list[int]:
        runs.append(batch)
        if world().rank == told:
            STOP.tell("a test")
        return batch

    try:
        shared(list(range(9)), lambda request: request, 1, run)
        return len(runs)
    except Interrupted as reason:
        return f"{reason} after {len(runs)}"
    finally:
        STOP.reset()


def test_a_stop_ends_the_tasks_between_two_batches_on_all_ranks() -> None:
    assert stopped_after_a_batch(0) == "a test after 1"
    assert run_on_ranks(2, stopped_after_a_batch, 1) == ["a test after 1"] * 2


def test_figures_of_a_task_have_the_interval_of_their_standard_error() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 7,
    }
    found = task_figures(values)
    assert found["acc"].interval == pytest.approx((0.304, 0.696)) and found["exact_match (strict)"].interval is None
    assert {name: figure.value for name, figure in found.items()} == {"acc": 0.5, "exact_match (strict)": 0.25}
