"""`training.objective`: what goes with it, and what computes it."""

from __future__ import annotations

import torch
from torch import nn

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.training.data.settings import PAIRED, UNPAIRED
from dist_subspace.training.objective import Likelihood, Objective
from dist_subspace.training.preferences.objectives import Dpo, Kto, OfPreferences, Orpo
from dist_subspace.training.preferences.reference import Reference, begins_with_more
from dist_subspace.training.preferences.trl_losses import check_trl, needs_kl

_KINDS: dict[str, type[OfPreferences]] = {"dpo": Dpo, "kto": Kto, "orpo": Orpo}
_FORMATS = {"dpo": PAIRED, "orpo": PAIRED, "kto": UNPAIRED}


def check_objective(config: Config) -> None:
    """Local: the objective, its data and what is trained go together, and TRL is there.

    Raises:
        UsageError: with one sentence.
    """
    objective, training = config.training.objective, config.training
    _check_format(config)
    if objective == "sft":
        return
    batch = training.global_batch_size
    if objective == "kto" and needs_kl(training.preference) and batch == 1:
        raise UsageError(
            "training.global_batch_size is 1 with training.objective 'kto', which gives each prompt of a batch the answer to "
            "another one; accepted: at least 2, or training.preference.loss_type apo_zero_unpaired"
        )
    dropout = config.subspace.dropout
    if dropout and training.preference.disable_dropout:
        raise UsageError(
            f"subspace.dropout is {dropout} with training.objective {objective!r}, which trains without dropout "
            "(training.preference.disable_dropout is true); accepted: subspace.dropout 0, or disable_dropout false"
        )
    check_trl(objective, training.preference)


def make_objective(config: Config, device: torch.device, model: nn.Module) -> Objective:
    """Local: what the loop asks for losses; `model` is as the run begins, in its engine."""
    kind = _KINDS.get(config.training.objective)
    if kind is None:
        return Likelihood(device)
    compares = kind is not Orpo
    return kind(config.training.preference, device, Reference(model, compares and begins_with_more(config)))


def without_dropout(config: Config, model: nn.Module) -> None:
    """Local: the model's own dropout is off where the objective compares it with its base."""
    if config.training.objective == "sft" or not config.training.preference.disable_dropout:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def is_about_preferences(config: Config) -> bool:
    return config.training.objective != "sft"


def _check_format(config: Config) -> None:
    objective, form = config.training.objective, config.data.format
    accepted = _FORMATS.get(objective)
    if accepted is None and form in (*PAIRED, *UNPAIRED):
        fitting = " or ".join(name for name, forms in _FORMATS.items() if form in forms)
        raise UsageError(
            f"data.format is {form!r} with training.objective {objective!r}, which learns from samples alone; accepted with it: "
            f"training.objective {fitting}"
        )
    if accepted is not None and form not in accepted:
        raise UsageError(
            f"training.objective is {objective!r} with data.format {form!r}; accepted with it: data.format "
            f"{' or '.join(accepted)}"
        )
