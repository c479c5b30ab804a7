"""The public functions that join the axes: storage, placement and subspace meet here, and in the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from dist_subspace.interchange.adapter import fill_adapter, read_adapter, split_factors
from dist_subspace.interchange.peft_import import read_peft
from dist_subspace.loading.transformers_internals import forget_quantization
from dist_subspace.placement.collectives import agreed
from dist_subspace.placement.optimizer_state import watch_optimizers
from dist_subspace.placement.zero import gathered, mark_leaf_blocks
from dist_subspace.statistics import settle
from dist_subspace.storage import adopt_all
from dist_subspace.subspace import SubspaceConfig, attach_method, attached


def attach(
    model: nn.Module,
    config: SubspaceConfig | None = None,
    *,
    cache: str | Path | None = None,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Put a subspace method on a transformers model; returns the same model.

    Takes a model of `load_frozen`, or one that transformers loaded itself: plain, with GPT-2's Conv1D, or with a
    `BitsAndBytesConfig` in 4 or 8 bits. Its linear layers become frozen operators (no weight is copied), everything else is
    frozen as it is. Call it before `deepspeed.initialize` or the Trainer; nothing is created later. Collective where there
    is a process group.

    Arguments:
        cache: a folder where statistics of the frozen matrices (SVDs) are kept and found again; rank 0 alone uses it.
        factors: statistics by layer name that are known already, the same on every rank.
        progress: called with (layers done, layers in all) while statistics are made.

    Raises:
        UsageError (a ValueError): for an unknown method or option, a target that matches nothing, a rank above a layer's
            dimensions, a constraint that the method cannot have.
    """
    adopt_all(model)
    attach_method(model, config or SubspaceConfig(), gathered)
    if attached(model).schedule is not None:
        watch_optimizers()  # whose moments the schedule will edit, whatever loop has made them
    settle(model, given=factors, cache=cache, progress=progress)
    forget_quantization(model)
    mark_leaf_blocks(model)
    return model


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved adapter on a model without one; returns the model, with the adapter's method attached.

    Raises:
        UsageError: for a folder without an adapter, or an adapter that does not fit the model.
    """
    with agreed("reading the adapter"):
        config, tensors = read_adapter(folder)
        factors, trained = split_factors(tensors)
    attach(model, config, factors=factors)
    fill_adapter(model, trained)
    return model


def import_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that PEFT wrote on a model without one; returns the model, with our method of the same function attached.

    Known are LoRA (rsLoRA, DoRA, ranks and alphas of single layers, PiSSA's and OLoRA's starts), AdaLoRA, IA3, VeRA,
    prompt-tuning, P-tuning and prefix-tuning, and modules that were trained in full. The model is any that `attach` takes.

    Raises:
        UsageError: a folder without such an adapter, a kind or a field of it that is not known, an adapter for another base.
            The model is untouched then.
    """
    with agreed("reading PEFT's adapter"):
        imported = read_peft(folder)
        imported.check(model)
    attach(model, imported.config)
    fill_adapter(model, imported.tensors)
    return model
