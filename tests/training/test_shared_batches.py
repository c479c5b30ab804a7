"""Two ranks on samples of different lengths: who gets which, and what the loss is a mean of, against plain torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.keys.bench import Bench, Outcome, run_here
from tests.keys.data_reference import Row, answered, marked, tokenizer_of
from tests.keys.reference import padded
from tests.keys.watch import Call
from tests.ranks import run_on_ranks

COUNT, STEPS, RATE = 12, 4, 0.05


def records(count: int, word: str) -> list[dict[str, str]]:
    """The lengths of prompts and answers differ, so that a mean over rows is none over tokens."""
    return [
        {"prompt": f"{word} {n}" + "?" * (n % 5), "completion": f"{n * n} " * (1 + n * n % 4)} for n in range(count)
    ]


def calls_of_a_run(config: dict[str, Any]) -> list[Call]:
    """In a rank: what it calls the model with."""
    return run_here(config).calls


class Shared:
    """One run on two ranks: three micro-batches of two a step, so that the second rank idles in each second round; five held-out
    samples in three micro-batches, the last of one. A step takes half of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)
        tokenizer = tokenizer_of(self.bench)
        self.rows, self.held_out = (
            [answered(tokenizer, r["prompt"], r["completion"]) for r in records(*few)]
            for few in ((COUNT, "train"), (5, "held out"))
        )
        config = self.bench.configuration(self._changes())
        self.calls: list[list[Call]] = run_on_ranks(2, calls_of_a_run, config)
        self.outcome = Outcome.of(config)

    def _changes(self) -> dict[str, Any]:
        return {
            "data.train": self.bench.write("pairs.jsonl", records(COUNT, "train")),
            "data.eval": self.bench.write("held.jsonl", records(5, "held out")),
            "data.format": "completion",
            "model.tokenizer": marked(self.bench),
            "deepspeed.preset": "zero2",
            "training.optim": "sgd",
            "training.learning_rate": RATE,
            "training.max_steps": STEPS,
            "training.global_batch_size": COUNT // 2,
            "training.per_device_train_batch_size": 2,
        }

    @property
    def trained(self) -> list[list[list[list[int]]]]:
        """Of each rank, the rows of each call that trains: two a step."""
        return [[call.rows for call in calls if call.trains] for calls in self.calls]

    @property
    def steps(self) -> list[list[Row]]:
        """The samples of each step with their labels: micro-batches go round the ranks; the last call of a rank that idles is
        for nothing."""
        first, second = self.trained
        known = {tuple(ids): (ids, labels) for ids, labels in self.rows}
        order = [[*first[2 * n], *second[2 * n], *first[2 * n + 1]] for n in range(STEPS)]
        return [[known[tuple(ids)] for ids in step] for step in order]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("shared"))


def labelled(rows: list[Row]) -> dict[str, Tensor]:
    inputs = padded([ids for ids, _ in rows])
    inputs["labels"] = padded([labels for _, labels in rows])["labels"].where(inputs["attention_mask"] == 1, -100)
    return inputs


def test_an_epoch_is_a_permutation_of_the_samples_and_each_rank_has_its_own(shared: Shared) -> None:
    epochs = [[tuple(ids) for step in shared.steps[n : n + 2] for ids, _ in step] for n in (0, 2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(tuple(ids) for ids, _ in shared.rows), "each sample once an epoch"
    assert epochs[0] != epochs[1], "the next epoch has another order"
    assert epochs[0] != [tuple(ids) for ids, _ in shared.rows], "the order is not the file's"


def test_losses_and_steps_are_those_of_one_process_on_the_whole_batch(shared: Shared) -> None:
    model = shared.bench.peft_model().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=RATE), []
    for step in shared.steps:
        loss = model(**labelled(step)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lines = shared.outcome.steps
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-5), "the mean over all targets of a step"
    assert [line["tokens"] for line in lines] == [
        sum(len(i) for s in shared.steps[: n + 1] for i, _ in s) for n in range(STEPS)
    ]
    for name, tensor in shared.outcome.adapter.items():
        kept = name.replace(".weight", ".default.weight") if "lora" in name else name
        kept = kept if kept in trained else name.removesuffix("weight") + "modules_to_save.default.weight"
        torch.testing.assert_close(tensor, trained[kept].detach(), rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        held = float(model.eval()(**labelled(shared.held_out)).loss)
    assert shared.outcome.evaluations[-1]["eval_loss"] == pytest.approx(held, rel=2e-5), "over all held-out targets"


def test_each_held_out_sample_is_seen_on_one_rank(shared: Shared) -> None:
    """In each evaluation; the rank that has no third micro-batch runs the shortest sample for nothing."""
    known = {tuple(ids) for ids, _ in shared.held_out}
    calls = [[c.rows for c in of if not c.training and tuple(c.rows[0]) in known] for of in shared.calls]
    count = len(shared.outcome.evaluations)
    assert [len(found) for found in calls] == [2 * count, 2 * count]
    real = calls[0] + calls[1][::2]
    assert Counter(tuple(row) for rows in real for row in rows) == Counter(dict.fromkeys(known, count))
    shortest = min((ids for ids, _ in shared.held_out), key=len)
    assert all(rows == [shortest] for rows in calls[1][1::2])
