"""The learning rate of a run: the one that was given, the checkpoint's, or the method's own for the width of its model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.families.names import ends_with_any
from dist_subspace.loading.load import model_widths
from dist_subspace.run_folder.trainer_state import TrainerState
from dist_subspace.subspace import Resolved, SuggestedRate, suggested_rate
from dist_subspace.subspace.core.targets import naming
from dist_subspace.training.changes import settings_before
from dist_subspace.training.optimizers import is_adamw

AUTO = "auto"
# Of TRL's defaults: 1e-6 for DPOConfig, KTOConfig and ORPOConfig, 2e-5 for SFTConfig.
SHARE_OF_PREFERENCES = 0.05


@dataclass(frozen=True)
class ChosenRate:
    """rate: what the run trains at; own: the method's, None where it is not known; said: where a rate comes from
    that nobody gave; warning: where the rate that was given is far from the method's own."""

    rate: float
    own: SuggestedRate | None
    said: str | None = None
    warning: str | None = None


def choose_rate(
    config: Config, resolved: Resolved, folder: Path, checkpoint: tuple[Path, TrainerState] | None
) -> ChosenRate:
    """Local, rank 0: what `training.learning_rate` comes to.

    A rate that was given stays, whatever the method's own is. `auto` is the rate of the checkpoint that the run goes on from,
    else the method's own.

    Arguments:
        folder: the model's, on this machine.

    Raises:
        UsageError: `auto` with another optimizer than AdamW, or with a model that has no layer whose width would tell the rate.
    """
    own = _own_rate(config, resolved, folder) if is_adamw(config.training.optim) else None
    if config.training.learning_rate != AUTO:
        return ChosenRate(config.training.rate, own, warning=_warning(config.training.rate, own))
    before = settings_before(*checkpoint).get("learning_rate") if checkpoint is not None else None
    if checkpoint is not None and isinstance(before, float):
        return ChosenRate(before, own, f"training.learning_rate is auto: {before:g}, as in {checkpoint[0].name}")
    if own is None:
        reason = (
            "no layer of this model tells how wide it is, which the rate goes by"
            if is_adamw(config.training.optim)
            else f"training.optim is {config.training.optim!r}, and the rates of methods are those of AdamW"
        )
        raise UsageError(f"training.learning_rate is auto, but {reason}; accepted: a number above 0")
    return ChosenRate(own.rate, own, f"training.learning_rate is auto: {own.rate:g}, {own.why}")


def with_rate(config: Config, rate: float) -> Config:
    """The configuration with the number that `auto` stands for, which config.yaml then holds."""
    return config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": rate})})


def _own_rate(config: Config, resolved: Resolved, folder: Path) -> SuggestedRate | None:
    widths = model_widths(folder, config.model.task, config.model.trust_remote_code)
    width = adapted_width(widths, resolved)
    if width is None:
        return None
    own, objective = suggested_rate(resolved.config, width), config.training.objective
    return own if objective == "sft" else own.times(SHARE_OF_PREFERENCES, f"for training.objective {objective}")


def adapted_width(widths: dict[str, int], resolved: Resolved) -> int | None:
    """The number of inputs that most of the adapted layers have, the smallest of several; where the targets name none of these
    layers (one block stands for all, and a method may sit beside the layers), that of all. None where there are no layers."""
    is_target, excluded = naming(resolved.targets), resolved.config.exclude_modules
    targeted = [inputs for name, inputs in widths.items() if is_target(name) and not ends_with_any(name, excluded)]
    counts = Counter(targeted or widths.values())
    return max(counts, key=lambda inputs: (counts[inputs], -inputs), default=None)


def _warning(rate: float, own: SuggestedRate | None) -> str | None:
    if own is None or not own.is_far(rate):
        return None
    far = f"{rate / own.rate:.0f} times" if rate > own.rate else f"{own.rate / rate:.0f} times below"
    return (
        f"training.learning_rate is {rate:g}, {far} {own.rate:g}, {own.why}: the run may "
        f"{'learn nothing' if rate < own.lowest else 'diverge'}; training.learning_rate: auto takes that rate"
    )
