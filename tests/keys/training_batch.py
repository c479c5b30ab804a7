"""Keys of `training` that say how many samples are in a step, in a micro-batch, and in which order they come."""

from __future__ import annotations

import pytest
import torch

from tests.keys.bench import HELD_OUT, RECORDS, Bench, Outcome
from tests.keys.reference import assert_follows, held_out_loss, train_plainly
from tests.keys.table import Key


def _sizes(outcome: Outcome) -> list[int]:
    """Samples of each micro-batch."""
    return [len(call.rows) for call in outcome.calls if call.trains]


def global_batch_size(bench: Bench) -> None:
    for size in (2, 8, None):
        outcome = bench.run({"training.global_batch_size": size, "training.max_steps": 4})
        step = RECORDS if size is None else size
        assert _sizes(outcome) == [2] * (4 * step // 2)
        assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on, batch=step))
        assert [line["samples"] for line in outcome.steps] == [step, 2 * step, 3 * step, 4 * step]


def per_device_train_batch_size(bench: Bench) -> None:
    for size in (1, 4):
        outcome = bench.run({"training.per_device_train_batch_size": size})
        assert _sizes(outcome) == [size] * (24 // size)
        assert outcome.trained_on == bench.usual().trained_on
        assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on))


def per_device_eval_batch_size(bench: Bench) -> None:
    """The seven held-out samples, once before the first step and once behind the last one."""
    for size, rows in ((3, [3, 3, 1]), (None, [2, 2, 2, 1])):
        changes = {"training.per_device_eval_batch_size": size, "data.eval": bench.held_out, "training.max_steps": 1}
        outcome = bench.run(changes)
        measured = [len(call.rows) for call in outcome.calls if not call.training and not call.grad]
        assert measured[: 2 * len(rows)] == rows * 2
        assert _sizes(outcome) == [2, 2]
        expected = held_out_loss(bench.peft_model(), outcome.evaluated_on[:HELD_OUT])
        assert outcome.evaluations[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def seed(bench: Bench) -> None:
    """The order of samples, the values that a method begins with, and dropout."""
    changes = {"training.num_train_epochs": 1, "training.max_steps": None, "subspace.dropout": 0.5}
    changes |= {"training.global_batch_size": RECORDS, "training.per_device_train_batch_size": RECORDS}
    runs = {n: bench.run(changes | {"training.seed": s}) for n, s in enumerate((0, 3, 3))}
    first, other, again = runs[0], runs[1], runs[2]
    for run in runs.values():
        assert sorted(run.trained_on) == sorted(bench.samples)
    assert first.trained_on != other.trained_on == again.trained_on
    assert other.steps[0]["loss"] == again.steps[0]["loss"]
    _masks_of_steps(bench)
    drawn = {s: _drawn(bench, s) for s in (0, 3)}
    assert any(name.endswith("score.weight") for name in drawn[0])
    for name, start in drawn[0].items():
        same = torch.allclose(start, drawn[3][name], rtol=0, atol=1e-20)
        assert same == name.endswith("lora_B.weight"), name  # which begins at 0


def _masks_of_steps(bench: Bench) -> None:
    """One sample again and again, and nothing learned: what differs between micro-batches is what dropout drops."""
    data = bench.write("same.jsonl", [{"text": "so it is"}] * 4)
    changes = {"data.train": data, "training.learning_rate": 1e-30, "training.per_device_train_batch_size": 4}
    changes |= {"subspace.dropout": 0.5, "training.max_steps": 3}
    losses = [line["loss"] for seed in (0, 3) for line in bench.run(changes | {"training.seed": seed}).steps]
    assert len(set(losses)) == 6, "some micro-batches drop the same, or both seeds do"


def _drawn(bench: Bench, seed: int) -> dict[str, torch.Tensor]:
    """The start of LoRA and of a new head, which a rate of next to nothing leaves as they were."""
    changes = {"training.max_steps": 1, "training.learning_rate": 1e-30, "training.seed": seed}
    labelled = bench.write("labelled.jsonl", [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(4)])
    changes |= {"model.task": "classification", "data.format": "classification", "data.train": labelled}
    config = bench.configuration(changes)
    config["subspace"] = {"method": "lora", "rank": 2}
    return bench.go(config).adapter


KEYS = [
    Key(
        "training.global_batch_size",
        (2, 8, None),
        "samples of a step, in micro-batches that add up to one large batch; null: all of an epoch",
        "one forward over the whole batch",
        global_batch_size,
    ),
    Key(
        "training.per_device_train_batch_size",
        (1, 4),
        "samples of a micro-batch; the trajectory stays",
        "one forward over the whole batch; the model's calls",
        per_device_train_batch_size,
    ),
    Key(
        "training.per_device_eval_batch_size",
        (3, None),
        "samples of a call in evaluation; the loss stays",
        "one forward over all held-out samples; the model's calls",
        per_device_eval_batch_size,
    ),
    Key(
        "training.seed",
        (0, 3),
        "order of samples, the method's initial values, dropout; the same seed: the same",
        "every sample once an epoch; what differs and what stays",
        seed,
    ),
]
