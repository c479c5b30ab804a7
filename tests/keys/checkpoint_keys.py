"""The keys of the section `checkpoint`: what is kept of a run, and how it continues."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_scheduler

from dist_subspace.run_folder.status import EXIT_USAGE
from tests.keys.bench import Bench
from tests.keys.reference import adamw, assert_follows, assert_values, held_out_loss, padded, train_plainly
from tests.keys.table import Key
from tests.tiny_run import make_model


def save_steps(bench: Bench) -> None:
    """Each checkpoint holds what a loop has after so many steps."""
    outcome = bench.run({"checkpoint.save_steps": 2, "training.max_steps": 5})
    assert outcome.checkpoints == [2, 4, 5]
    for step in outcome.checkpoints:
        expected = train_plainly(bench.peft_model(), outcome.trained_on[: 4 * step])
        saved = load_file(outcome.folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert_values(saved, expected.values)
    assert bench.usual().checkpoints == [6], "a longer distance leaves the last one alone"


def save_total_limit(bench: Bench) -> None:
    for limit, kept in ((1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])):
        changes = {"checkpoint.save_steps": 1, "checkpoint.save_total_limit": limit, "training.max_steps": 4}
        assert bench.run(changes).checkpoints == kept


def resume(bench: Bench) -> None:
    """However it continues, the run goes the way of one that was not interrupted."""
    changes = {"checkpoint.save_steps": 2, "training.lr_scheduler_type": "linear", "training.warmup_steps": 1}
    config = bench.configuration(changes)
    first = bench.go(config)
    rows = first.trained_on
    expected = train_plainly(
        bench.peft_model(), rows, scheduler=partial(get_scheduler, "linear", num_warmup_steps=1, num_training_steps=6)
    )
    assert_follows(first, expected)
    shutil.rmtree(first.folder / "checkpoint-6")  # as it was when it was killed in the last step
    elsewhere = bench.run(changes | {"checkpoint.resume": str(first.folder / "checkpoint-2")})
    assert [line["step"] for line in elsewhere.steps] == [3, 4, 5, 6] and elsewhere.trained_on[-16:] == rows[8:]
    assert_values(elsewhere.adapter, expected.values)
    automatic = bench.go(config)
    assert automatic.trained_on[-8:] == rows[16:] and len(automatic.trained_on) < 16
    assert_follows(automatic, expected)
    config["checkpoint"]["resume"] = "none"
    anew = bench.go(config)
    assert anew.trained_on == rows
    assert_follows(anew, expected)


class _Evaluated:
    """What a loop knows after each step: the held-out loss and the adapter."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.losses: dict[int, float] = {}
        self.values: dict[int, dict[str, Tensor]] = {}

    def __call__(self, step: int, model: nn.Module, schedule: Any) -> None:
        self.losses[step] = held_out_loss(model, self.rows)
        self.values[step] = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def _best(bench: Bench, metric: str, greater: bool | None) -> None:
    """On texts that training has nothing of, the held-out loss turns round: neither the first nor the last step is the best."""
    texts, rate = (("ABC DEF", "QRS TUV W"), 0.05) if greater else (("#!?", "%&/()="), 0.3)
    data = bench.write(f"strange-{rate}.jsonl", [{"text": text} for text in texts])
    changes = {"data.eval": data, "run.eval_steps": 1, "training.learning_rate": rate, "checkpoint.save_total_limit": 1}
    given = {"checkpoint.metric_for_best_model": metric, "checkpoint.greater_is_better": greater}
    outcome = bench.run(changes | given)
    seen = _Evaluated(outcome.evaluated_on[:2])
    train_plainly(bench.peft_model(), outcome.trained_on, optimizer=partial(adamw, lr=rate), after_step=seen)
    measured = [line["eval_loss"] for line in outcome.evaluations]
    assert measured[1:] == pytest.approx(list(seen.losses.values()), rel=5e-5)
    best = (max if greater else min)(seen.losses, key=lambda step: seen.losses[step])
    assert 1 < best < 6
    assert outcome.checkpoints == [best, 6]
    for name, tensor in seen.values[best].items():
        torch.testing.assert_close(outcome.adapter[name], tensor, rtol=1e-2, atol=1e-3)


def metric_for_best_model(bench: Bench) -> None:
    for metric in ("loss", "eval_perplexity"):
        _best(bench, metric, None)


def greater_is_better(bench: Bench) -> None:
    for greater in (True, False):
        _best(bench, "loss", greater)


def allow_different(bench: Bench) -> None:
    """Each difference is refused with a sentence, and goes on from the checkpoint where it is allowed."""
    other = bench.folder / "other-model"
    make_model(other, seed=1)
    texts = bench.write("other.jsonl", [{"text": f"other {n} words"} for n in range(12)])
    changed = {
        "model": {"model.path": str(other)},
        "method": {"subspace.constraint_weight": 0.2},  # of a constraint that there is none of
        "data": {"data.train": texts},
    }
    first = bench.run({"training.max_steps": 2})
    begun = train_plainly(bench.peft_model(), first.trained_on)
    for what, change in changed.items():
        changes = change | {"checkpoint.resume": str(first.folder / "checkpoint-2"), "training.max_steps": 3}
        refused = bench.run(changes, EXIT_USAGE)
        assert f"made with another {what} (" in refused.message and refused.calls == []
        others = [name for name in changed if name != what]
        bench.run(changes | {"checkpoint.allow_different": others}, EXIT_USAGE)
        went_on = bench.run(changes | {"checkpoint.allow_different": [what]})
        model = bench.peft_model(base=other if what == "model" else None)
        set_peft_model_state_dict(model, begun.values)
        expected = float(model(**padded(went_on.trained_on[-4:])).loss.detach())
        assert [line["loss"] for line in went_on.steps] == pytest.approx([expected], rel=2e-5)


KEYS = [
    Key("checkpoint.save_steps", (2,), "after which steps a checkpoint is written", "a loop's values then", save_steps),
    Key("checkpoint.save_total_limit", (1, 2, None), "how many stay", "the definition: the newest", save_total_limit),
    Key(
        "checkpoint.resume",
        ("auto", "none", "a folder"),
        "where a run goes on",
        "a loop that was not interrupted",
        resume,
    ),
    Key(
        "checkpoint.metric_for_best_model",
        ("loss", "eval_perplexity"),
        "which step's adapter is kept and becomes the result",
        "a loop that evaluates after each step",
        metric_for_best_model,
    ),
    Key(
        "checkpoint.greater_is_better",
        (True, False),
        "which end of the metric is the best",
        "a loop that evaluates after each step",
        greater_is_better,
    ),
    Key(
        "checkpoint.allow_different",
        ("model", "method", "data"),
        "with which differences a run is continued",
        "the loss of PEFT's model at the checkpoint's values",
        allow_different,
    ),
]
