"""Keys of `training` that choose and set the optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_subspace.checkpoint.status import EXIT_USAGE
from tests.keys.bench import Bench, Outcome
from tests.keys.reference import adamw, assert_follows, differ, train_plainly
from tests.keys.table import Key

ON_A_CPU = {
    "adamw_torch": adamw,
    "adamw_torch_fused": partial(adamw, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


def _follows(bench: Bench, changes: dict[str, Any], **reference: Any) -> Outcome:
    """The changed run goes the reference's way, and that is another than the unchanged run's."""
    outcome = bench.run(changes)
    assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on, **reference))
    assert differ(outcome, bench.usual())
    return outcome


def optim(bench: Bench) -> None:
    assert_follows(bench.usual(), train_plainly(bench.peft_model(), bench.usual().trained_on))
    for name, made in ON_A_CPU.items():
        if name != "adamw_torch":
            _follows(bench, {"training.optim": name, "training.max_steps": 3}, optimizer=made)
    if not torch.cuda.is_available():
        outcome = bench.run({"training.optim": "adamw_bnb_8bit"}, EXIT_USAGE)
        assert outcome.message.startswith("training.optim is 'adamw_bnb_8bit'") and outcome.calls == []


def learning_rate(bench: Bench) -> None:
    _follows(bench, {"training.learning_rate": 0.003}, optimizer=partial(adamw, lr=0.003))


def adam_beta1(bench: Bench) -> None:
    _follows(bench, {"training.adam_beta1": 0.5}, optimizer=partial(adamw, betas=(0.5, 0.999)))


def adam_beta2(bench: Bench) -> None:
    _follows(bench, {"training.adam_beta2": 0.7}, optimizer=partial(adamw, betas=(0.9, 0.7)))


def adam_epsilon(bench: Bench) -> None:
    _follows(bench, {"training.adam_epsilon": 0.01}, optimizer=partial(adamw, eps=0.01))


def _decaying(kind: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """With decay on matrices alone."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    assert matrices and vectors
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    return kind(groups, lr=0.01)  # type: ignore[no-any-return]


def weight_decay(bench: Bench) -> None:
    _follows(bench, {"training.weight_decay": 0.5}, optimizer=partial(_decaying, torch.optim.AdamW))
    changes = {"training.weight_decay": 0.5, "training.optim": "sgd"}
    _follows(bench, changes, optimizer=partial(_decaying, torch.optim.SGD))


def max_grad_norm(bench: Bench) -> None:
    for norm in (0.1, 0.0):  # every gradient's norm is above the first; the base configuration does not clip
        changes = {"training.max_grad_norm": norm, "training.optim": "sgd"}
        outcome = _follows(bench, changes, optimizer=ON_A_CPU["sgd"], max_grad_norm=norm)
        assert min(step["grad_norm"] for step in outcome.steps) > 0.1, "what is logged is the norm before clipping"


KEYS = [
    Key(
        "training.optim", tuple(ON_A_CPU), "the optimizer", "torch.optim; transformers' Trainer (names of GPUs)", optim
    ),
    Key("training.learning_rate", (0.003,), "the rate of every step", "torch.optim.AdamW", learning_rate),
    Key("training.adam_beta1", (0.5,), "decay of the mean gradient", "torch.optim.AdamW", adam_beta1),
    Key("training.adam_beta2", (0.7,), "decay of the squared gradient", "torch.optim.AdamW", adam_beta2),
    Key("training.adam_epsilon", (0.01,), "what is added to the root", "torch.optim.AdamW", adam_epsilon),
    Key(
        "training.weight_decay",
        (0.5,),
        "decay of matrices, never of one-dimensional parameters",
        "torch.optim.AdamW and SGD with two groups",
        weight_decay,
    ),
    Key(
        "training.max_grad_norm",
        (0.1, 0),
        "the update of a gradient above it; 0: nothing is clipped",
        "torch.nn.utils.clip_grad_norm_",
        max_grad_norm,
    ),
]
