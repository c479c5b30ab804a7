"""The loop that a run is compared with: plain torch, transformers' schedule, PEFT's adapter, the same order of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.keys.bench import Outcome

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def decaying(parameters: list[nn.Parameter], kind: Any = torch.optim.AdamW, decay: float = 0.5) -> Optimizer:
    """With decay on matrices alone."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    assert matrices and vectors
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return kind(groups, lr=0.01)  # type: ignore[no-any-return]


@dataclass
class Trajectory:
    """losses, rates, norms: of each step, the rate and the norm as they were before it. values: of the adapter at the end."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


def adamw(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    """What the base configuration asks for."""
    return torch.optim.AdamW(
        parameters, **({"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0} | options)
    )


def train_plainly(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    batch: int = 4,
    optimizer: MakeOptimizer = adamw,
    scheduler: Callable[[Optimizer], Any] | None = None,
    max_grad_norm: float = 0.0,
    after_step: Callable[[int, nn.Module, Any], None] | None = None,
    before: bool = False,
) -> Trajectory:
    """One optimizer step for each `batch` rows, all of them in one forward; every token is a target. A step whose gradient is
    not finite is none.

    `after_step(number, model, scheduler)` is called behind each step, for what a loop does there beside it; with `before`, as
    number 0 ahead of the first one too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim, found = optimizer(trained), Trajectory()
    schedule = scheduler(optim) if scheduler else None
    model.train()
    if before and after_step is not None:
        after_step(0, model, schedule)
    for start in range(0, len(rows), batch):
        loss = model(**padded(rows[start : start + batch])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
        found.losses.append(float(loss.detach()))
        found.rates.append(float(optim.param_groups[0]["lr"]))
        found.norms.append(float(norm))
        if norm.isfinite():
            optim.step()
        optim.zero_grad()
        if schedule is not None and not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            schedule.step()
        if after_step is not None:
            after_step(start // batch + 1, model, schedule)
    found.values = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    return found


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids, mask and labels, as transformers takes them."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Sequence[int]]) -> float:
    """The mean over all targets of all rows, without dropout."""
    was = model.training
    loss = float(model.eval()(**padded(rows)).loss)
    model.train(was)
    return loss


def assert_follows(outcome: Outcome, expected: Trajectory, first: int | None = None) -> None:
    """Loss, rate and norm of every step, and the adapter at the end, to the rounding of float32; `first`: of so many steps,
    and not the end."""
    steps = outcome.steps[:first]
    assert len(steps) == len(expected.losses), f"{len(steps)} steps were made, and {len(expected.losses)} are right"
    for name, values in (("learning_rate", expected.rates), ("loss", expected.losses), ("grad_norm", expected.norms)):
        found = [math.nan if step[name] is None else step[name] for step in steps]
        assert found == pytest.approx(values, rel=2e-5, nan_ok=True), f"{name} leaves the reference"
    if first is None:
        assert_values(outcome.adapter, expected.values)


def assert_values(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def differ(one: Outcome, other: Outcome) -> bool:
    """Whether two runs end with different adapters: a changed key that must show, did."""
    return any(not torch.equal(one.adapter[name], tensor) for name, tensor in other.adapter.items())
