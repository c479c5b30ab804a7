"""What the configuration says otherwise than it did when the checkpoint was made. Local, rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.config import Config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import CheckpointFolder
from dist_subspace.run_folder.trainer_state import TrainerState
from dist_subspace.training.data.cutting import Cutting

_FOLLOWED = "the steps that come follow the new value"
_LENGTH = "the learning rate's schedule, and the method's where it has one, are those of the new length"
# Keys of the training section that change what comes, and what becomes of them; the others change nothing that is computed.
_EFFECT = {
    "max_steps": _LENGTH,
    "num_train_epochs": _LENGTH,
    "global_batch_size": "the data goes on at sample (or packed row) {place:,}, which is the step times the new size",
    "optim": "its moments begin at zero",
    "adam_beta1": _FOLLOWED,
    "adam_beta2": _FOLLOWED,
    "adam_epsilon": _FOLLOWED,
    "learning_rate": _FOLLOWED,
    "lr_scheduler_type": "the steps that come follow the new schedule from their number on",
    "lr_scheduler_kwargs": _FOLLOWED,
    "warmup_steps": _FOLLOWED,
    "weight_decay": _FOLLOWED,
    "max_grad_norm": _FOLLOWED,
    "objective": _FOLLOWED,
    "preference": _FOLLOWED,
}


def changed_settings(config: Config, folder: Path, state: TrainerState) -> list[str]:
    """A sentence for each.

    Arguments:
        folder: the checkpoint; one that is older than its field for the settings lies beside its run's config.yaml.
    """
    before = settings_before(folder, state)
    now = config.training.model_dump(mode="json")
    place = state.step * (config.training.global_batch_size or 0)  # a plan's configuration has the number
    return [
        f"training.{key} is {now[key]}, and was {before[key]} when {folder.name} was made: {effect.format(place=place)}"
        for key, effect in _EFFECT.items()
        if key in before and before[key] != now[key] and now[key] is not None  # of steps and epochs one is null
    ]


def settings_before(folder: Path, state: TrainerState) -> Mapping[str, Any]:
    """The training section of the run that made the checkpoint, as its configuration had it; empty where nobody knows."""
    return state.training or _beside(folder)


def earlier_tokens(config: Config, cutting: Cutting, folder: Path, state: TrainerState) -> str | None:
    """A sentence where the checkpoint is of a version that made other tokens of the same records. Only whether it is as old as
    that is known: conversations were marked, and long samples cut, in another way before the settings were kept in it."""
    if state.training or (config.data.format != "chat" and not cutting.cut):
        return None
    return (
        f"{folder.name} is of an earlier version, which marked conversations and cut long samples otherwise: the samples "
        "that come may be other tokens than they would have been"
    )


def _beside(folder: Path) -> Mapping[str, Any]:
    try:
        return load_config(CheckpointFolder(folder).run.config).training.model_dump(mode="json")
    except UsageError:  # none, or of another version
        return {}
