"""Gradients kept for a method's schedule: engines clear them inside their step, so they are summed up while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class GradientCollector:
    """The sum of this rank's gradients of each parameter since the last `take`, float32. Nothing is kept while `paused`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}  # a split parameter shows none
        self.sums: dict[str, Tensor] = {}
        self.paused = False
        for name, parameter in self.parameters.items():
            parameter.register_hook(self._adding(name))

    def _adding(self, name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            if self.paused:
                return
            if name in self.sums:
                self.sums[name].add_(gradient)
            else:
                self.sums[name] = gradient.detach().to(torch.float32, copy=True)

        return add

    def take(self) -> dict[str, Tensor]:
        """The sums, which start anew; empty where no backward has run."""
        taken, self.sums = self.sums, {}
        return taken
