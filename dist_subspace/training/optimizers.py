"""Optimizers by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_subspace.errors import UsageError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class AdamSettings:
    """learning_rate of a group that names none; betas and epsilon of the Adam family."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float


def _adamw(groups: Groups, s: AdamSettings, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.epsilon, **options)


def _of_torch(name: str, **options: Any) -> Callable[[Groups, AdamSettings], torch.optim.Optimizer]:
    return lambda groups, s: getattr(torch.optim, name)(groups, lr=s.learning_rate, **options)


def _of_bitsandbytes(name: str, **options: Any) -> Callable[[Groups, AdamSettings], torch.optim.Optimizer]:
    def make(groups: Groups, s: AdamSettings) -> torch.optim.Optimizer:
        import bitsandbytes

        adam = {"eps": s.epsilon} if "Adam" in name else {}
        made = getattr(bitsandbytes.optim, name)
        return made(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), **adam, **options)

    return make


ON_ANY_DEVICE: Mapping[str, Callable[[Groups, AdamSettings], torch.optim.Optimizer]] = {
    "adamw_torch": lambda groups, s: _adamw(groups, s),
    "adamw_torch_fused": lambda groups, s: _adamw(groups, s, fused=True),
    "sgd": _of_torch("SGD"),
    "adagrad": _of_torch("Adagrad"),
    "rmsprop": _of_torch("RMSprop"),
}
ON_CUDA: Mapping[str, Callable[[Groups, AdamSettings], torch.optim.Optimizer]] = {
    "adamw_bnb_8bit": _of_bitsandbytes("AdamW8bit"),
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw_32bit": _of_bitsandbytes("PagedAdamW32bit"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
    "lion_32bit": _of_bitsandbytes("Lion32bit"),
    "lion_8bit": _of_bitsandbytes("Lion8bit"),
    "paged_lion_32bit": _of_bitsandbytes("PagedLion32bit"),
    "paged_lion_8bit": _of_bitsandbytes("PagedLion8bit"),
}


def is_adamw(name: str) -> bool:
    """Whether a step is AdamW's, however its state is held."""
    return "adamw" in name


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that this device has no kernels for.

    Raises:
        UsageError: naming `training.optim` and what is accepted here.
    """
    if name in ON_CUDA and device.type != "cuda":
        raise UsageError(
            f"training.optim is {name!r}, which bitsandbytes has on GPUs only; accepted here: {', '.join(ON_ANY_DEVICE)}"
        )


def make_optimizer(name: str, groups: Groups, settings: AdamSettings) -> torch.optim.Optimizer:
    return (ON_ANY_DEVICE | ON_CUDA)[name](groups, settings)  # type: ignore[operator]
