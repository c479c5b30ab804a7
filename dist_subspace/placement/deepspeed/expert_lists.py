"""Adapters on experts that are modules in a list, where gradients are added up as they come: refused, whatever loop trains.

ZeRO's stages 1 and 2 put each gradient into a bucket when backward has made it, and add the ranks' buckets up: ranks whose
tokens go to different experts would add up different parameters, or wait for each other forever. Stage 0 makes zeros of what is
missing, and stage 3 takes all of a leaf module at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.families.experts import callers_of_experts
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.fragments import is_bucketed
from dist_subspace.placement.deepspeed.json_file import zero_stage


def check_expert_lists(model: nn.Module, config: Mapping[str, Any], ranks: int) -> None:
    """Refuse what an engine of this configuration would add up wrongly.

    Raises:
        UsageError: alike on every rank.
    """
    stage = zero_stage(config)
    if ranks > 1 and stage in (1, 2):
        for name in _trained_lists(model):
            raise _refusal(name, f"ZeRO stage {stage}", ranks)


def watch_expert_lists(model: nn.Module) -> None:
    """Refuse the same in the first training forward under an engine that others have made, as transformers' Trainer does."""
    if callers_of_experts(model) and not hasattr(model, _WATCH):
        hook = model.register_forward_pre_hook(_look_at_the_engine)
        setattr(model, _WATCH, hook)


_WATCH = "_dist_subspace_expert_lists"


def _look_at_the_engine(model: nn.Module, _: tuple[Any, ...]) -> None:
    if not (model.training and torch.is_grad_enabled()):
        return
    trained = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    if trained is None or not is_bucketed(trained):
        return
    if world().size > 1:
        for name in _trained_lists(model):
            raise _refusal(name, "ZeRO stage 1 or 2", world().size)
    getattr(model, _WATCH).remove()


def _trained_lists(model: nn.Module) -> list[str]:
    """What calls the experts of a list that are trained."""
    names = {module: name for name, module in model.named_modules()}
    callers = callers_of_experts(model)
    return [names[module] for module in callers if any(parameter.requires_grad for parameter in module.parameters())]


def _refusal(name: str, stage: str, ranks: int) -> UsageError:
    return UsageError(
        f"{name} calls those experts of a list that its tokens go to, and these are trained: {stage} would add up the gradients "
        f"of different experts on its {ranks} ranks; accepted: ZeRO stage 0 or 3 (deepspeed.preset zero0, zero3), or targets "
        "that are no experts"
    )
