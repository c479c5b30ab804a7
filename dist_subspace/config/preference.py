"""What the objectives of preferences need: TRL's names for the same things."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from dist_subspace.config import names
from dist_subspace.config.fields import Section
from dist_subspace.errors import UsageError


class PreferenceArguments(Section):
    """How an objective of preferences weighs them, by the names that TRL has."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How near dpo and kto keep the model to the base; in orpo, the weight of the odds ratio.",
    )
    loss_type: names.PreferenceLoss | None = Field(
        default=None, description="TRL's loss; null: sigmoid (dpo), kto (kto). orpo has one alone."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs that are the wrong way round (dpo: robust, exo_pair)."
    )
    desirable_weight: float = Field(default=1.0, ge=0, description="Weight of desirable answers in the loss (kto).")
    undesirable_weight: float = Field(default=1.0, ge=0, description="Weight of undesirable answers in the loss (kto).")
    disable_dropout: bool = Field(
        default=True, description="Train without the model's dropout, which the base that is compared with has not."
    )


_KEYS: Mapping[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta", "loss_type", "label_smoothing", "disable_dropout"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight", "disable_dropout"),
    "orpo": ("beta", "disable_dropout"),
}
LOSSES: Mapping[str, tuple[str, ...]] = {"dpo": names.DPO_LOSSES, "kto": names.KTO_LOSSES}
"""The losses of an objective; the first is what null means."""
_SMOOTHED = ("robust", "exo_pair")


def check_arguments(objective: str, arguments: PreferenceArguments) -> None:
    """Every value that is no default means something to the objective.

    Raises:
        UsageError: one that does not, or a loss that the objective has not.
    """
    default = PreferenceArguments()
    for key in PreferenceArguments.model_fields:
        value = getattr(arguments, key)
        if value != getattr(default, key) and key not in _KEYS[objective]:
            using = " or ".join(repr(name) for name, keys in _KEYS.items() if key in keys)
            raise UsageError(
                f"training.preference.{key} is {value!r}, which training.objective {objective!r} does not use; accepted with it: "
                f"training.objective {using}"
            )
    losses = LOSSES.get(objective, ())
    if arguments.loss_type is not None and arguments.loss_type not in losses:
        raise UsageError(
            f"training.preference.loss_type is {arguments.loss_type!r} with training.objective {objective!r}; accepted: "
            f"{', '.join(losses)}"
        )
    loss, smoothing = arguments.loss_type, arguments.label_smoothing
    if smoothing and loss not in _SMOOTHED:
        raise UsageError(
            f"training.preference.label_smoothing is {smoothing}, which loss_type {loss or losses[0]!r} does not use; accepted "
            f"with it: loss_type {' or '.join(_SMOOTHED)}"
        )
    if loss == "exo_pair" and not smoothing:
        raise UsageError(
            "training.preference.label_smoothing is 0.0, whose logarithm loss_type 'exo_pair' takes; accepted: a number above 0"
        )
