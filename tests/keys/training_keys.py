"""The keys of the section `training`: optimizer, schedule and batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from tests.keys.bench import Bench
from tests.keys.reference import adamw, assert_follows, differ, train_plainly
from tests.keys.table import Key


def _decaying(parameters: list[nn.Parameter]) -> Optimizer:
    """AdamW with decay on matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def weight_decay(bench: Bench) -> None:
    outcome = bench.run({"training.weight_decay": 0.3})
    assert_follows(outcome, train_plainly(bench.peft_model(), outcome.trained_on, optimizer=_decaying))
    assert differ(outcome, bench.usual())


def max_grad_norm(bench: Bench) -> None:
    for norm in (0.1, 0.0):  # every gradient's norm is above the first
        outcome = bench.run({"training.max_grad_norm": norm, "training.optim": "sgd"})
        sgd = partial(torch.optim.SGD, lr=0.01)
        expected = train_plainly(bench.peft_model(), outcome.trained_on, optimizer=sgd, max_grad_norm=norm)
        assert min(expected.norms) > 0.1
        assert_follows(outcome, expected)


KEYS = [
    Key("training.weight_decay", (0.3,), "decay of the matrices, not of vectors", "torch.optim.AdamW", weight_decay),
    Key("training.max_grad_norm", (0.1, 0), "clips; 0: not", "torch.nn.utils.clip_grad_norm_", max_grad_norm),
]
__all__ = ["KEYS", "adamw"]
