"""The loss that keeps a mixture's experts equally busy, beside the language model's where a router is trained.

It is transformers' own, which a family makes of its routers' logits when it is asked for them (`output_router_logits`), with the
family's coefficient. Left frozen, routers need none: their choices follow the hidden states alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.experts import routers_among
from dist_subspace.notices import named
from dist_subspace.placement.protocol import Engine

ASKS = "output_router_logits"
# What a class of transformers, or its configuration, calls the factor that it multiplies the loss with.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class RouterLoss:
    """coefficient: that the loss is multiplied with before it is added to the mean of the targets' losses."""

    coefficient: float

    def summed(self, output: Any, targets: int) -> Tensor:
        """What it adds to the sum over a micro-batch's targets: a micro-batch weighs as many of the global batch's targets as it
        has, whatever ranks there are.

        Arguments:
            output: of the model, which was asked for its routers' logits.

        Raises:
            UsageError: no gradient would reach the routers, because blocks are recomputed in a form that hides what is inside.
        """
        loss = output.get("aux_loss")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise UsageError(
                "a router is trained, but the auxiliary loss that keeps it in balance has no gradient, because recomputed blocks "
                "hide the routers' logits; accepted: training.gradient_checkpointing false, training.use_reentrant false, or no "
                "router among subspace.modules_to_save and target_modules"
            )
        return self.coefficient * targets * loss.float()


def router_loss_of(model: nn.Module | Engine) -> RouterLoss | None:
    """Local, alike on every rank: what the model's trained routers add to the loss; None where no router is trained, or the
    family has no such loss."""
    module: Any = getattr(model, "module", model)
    coefficient = _coefficient(module)
    return RouterLoss(coefficient) if coefficient and trained_routers(module) else None


def trained_routers(model: nn.Module) -> list[str]:
    """The names of the routers' parameters that are trained."""
    return routers_among(model, [name for name, p in model.named_parameters() if p.requires_grad])


def about_routers(model: nn.Module) -> str | None:
    """One sentence on what training a router adds to the loss; None where none is trained."""
    trained = trained_routers(model)
    if not trained:
        return None
    made = router_loss_of(model)
    if made is None:
        return (
            f"{named(trained)} are trained, and a {type(model).__name__} of transformers has no auxiliary loss that keeps "
            "experts equally busy"
        )
    return (
        f"{named(trained)} are trained, so that the loss has the family's auxiliary loss, {made.coefficient:g} x its load "
        "balancing (evaluation has none)"
    )


def _coefficient(model: Any) -> float:
    if ASKS not in inspect.signature(type(model).forward).parameters:
        return 0.0
    holders = (model, getattr(model, "config", None))
    found = (getattr(holder, name, None) for holder in holders for name in _COEFFICIENTS)
    return next((float(value) for value in found if isinstance(value, int | float)), 0.0)
