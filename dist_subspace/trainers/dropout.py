"""Dropout of a method's branch, which is no `nn.Dropout`: who turns those off (TRL's `disable_dropout`) would leave it on."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dist_subspace.subspace import Settings


def without_dropout(model: nn.Module) -> None:
    """Local: the method's branches drop nothing from now on."""
    for module in model.modules():
        settings = getattr(module, "settings", None)
        if isinstance(settings, Settings) and settings.dropout:
            module.settings = replace(settings, dropout=0.0)  # type: ignore[assignment]
