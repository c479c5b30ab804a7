"""What an optimizer is given: the trained parameters, flat or in groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_subspace.subspace.attach import attached
from dist_subspace.subspace.core.rates import LearningRateRatio
from dist_subspace.subspace.core.schedule import late_factors_of
from dist_subspace.subspace.core.stacks import StackedPart


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is trained, in the model's order; nothing else has `requires_grad`."""
    return [p for p in model.parameters() if p.requires_grad]


def named_trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trained parameters in groups for an optimizer; no group is empty (DeepSpeed drops empty ones, and a scheduler
    that counts groups then fails: docs/failures.md, "An empty parameter group breaks the scheduler").

    One-dimensional parameters have no weight decay, nor have those that are one-dimensional for each expert. Where the method has
    a learning-rate ratio (LoRA+), B's rate is multiplied by it. What is trained from a later step on (LoRA-Dash's δ) is a group
    of its own.
    """
    attachment = attached(model)
    ratio = float(attachment.settings.options.get("lr_ratio", 1.0))
    method = attachment.resolved.method
    left_factors = method.left_factors if issubclass(method, LearningRateRatio) else ()
    late_factors = late_factors_of(method)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named_trainables(model).items():
        factor = name.rpartition(".")[2]
        rate = learning_rate * (ratio if factor in left_factors else 1.0)
        part = model.get_submodule(name.rpartition(".")[0])
        of_experts = isinstance(part, StackedPart) and not part.shared
        decay = weight_decay if len(attachment.shapes[name]) - of_experts > 1 else 0.0
        groups.setdefault((rate, decay, factor in late_factors), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay, _), params in groups.items()]
