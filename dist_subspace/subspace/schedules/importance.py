"""Smoothed sensitivity of trained entries, by which AdaLoRA shares out its budget (arXiv 2303.10512; docs/methods.md, "AdaLoRA's
budget")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SMOOTHED, UNCERTAINTY = "importance", "uncertainty"


class Importance:
    """For every entry w: `I = |w ∂w|`, `Ī ← β₁ Ī + (1 - β₁) I`, `Ū ← β₂ Ū + (1 - β₂) |I - Ī|` with the new Ī, score `Ī Ū`."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """One step's gradient of the parameter `name`, float32."""
        sensitivity = (weight.float() * gradient).abs_()
        for held in (self.smoothed, self.uncertainty):
            held[name] = held[name].to(sensitivity.device) if name in held else torch.zeros_like(sensitivity)
        smoothed = self.smoothed[name].mul_(self.beta1).add_(sensitivity, alpha=1 - self.beta1)
        self.uncertainty[name].mul_(self.beta2).add_(sensitivity.sub_(smoothed).abs_(), alpha=1 - self.beta2)

    def score(self, name: str) -> Tensor:
        return self.smoothed[name] * self.uncertainty[name]

    def __bool__(self) -> bool:
        """Whether any gradient has been seen."""
        return bool(self.smoothed)

    def tensors(self) -> dict[str, Tensor]:
        kinds = ((SMOOTHED, self.smoothed), (UNCERTAINTY, self.uncertainty))
        return {f"{name}.{kind}": tensor for kind, held in kinds for name, tensor in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for kind, held in ((SMOOTHED, self.smoothed), (UNCERTAINTY, self.uncertainty)):
            of_kind = {key.removesuffix(f".{kind}"): tensors[key] for key in tensors if key.endswith(f".{kind}")}
            held.clear()
            held.update({name: tensor.clone() for name, tensor in of_kind.items()})
