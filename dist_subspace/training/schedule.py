"""The learning rate as a function of the step, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

PLATEAU = "reduce_lr_on_plateau"


class Schedule:
    """Learning rates of the optimizer's groups.

    The schedule runs on an optimizer of its own, with the same groups and one dummy number each, so that it can be put at
    any step without touching the real one. `warmup_steps` below 1 is a share of all steps.
    """

    def __init__(
        self, name: str, rates: list[float], warmup_steps: float, total_steps: int, options: Mapping[str, Any]
    ) -> None:
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
        self._optimizer = torch.optim.SGD(groups, lr=rates[0])
        self.name = name
        self._scheduler = get_scheduler(
            name,
            self._optimizer,
            num_warmup_steps=warmup_count(warmup_steps, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(options),
        )

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group for the step that comes."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def advance(self) -> None:
        """One optimizer step is done."""
        self._optimizer.step()
        if self.name != PLATEAU:
            self._scheduler.step()

    def evaluated(self, loss: float) -> None:
        """An evaluation is done; only a plateau schedule listens."""
        if self.name == PLATEAU:
            self._scheduler.step(loss)

    def state(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        plain = {k: v for k, v in self._scheduler.state_dict().items() if isinstance(v, (int, float, str, bool, list))}
        return {"rates": self.rates, "scheduler": {k: v for k, v in plain.items() if _is_plain(v)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._scheduler.load_state_dict(dict(self._scheduler.state_dict()) | dict(state["scheduler"]))
        for group, rate in zip(self._optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate


def warmup_count(warmup_steps: float, total_steps: int) -> int:
    """Steps of warm-up; a value below 1 is a share of all, rounded up as Hugging Face does."""
    return -int(-warmup_steps * total_steps // 1) if 0 < warmup_steps < 1 else int(warmup_steps)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, (int, float)) for v in value)
    return isinstance(value, (int, float, str, bool))
