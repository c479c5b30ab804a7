"""Another adapter of the same method on the same layers, put into a model in the place of the one that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dist_subspace.adapted.source import adapter_folder
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import fill_adapter
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.loaded_adapter import LoadedAdapter
from dist_subspace.interchange.tensor_names import file_key, split_factors
from dist_subspace.placement.collectives import agreed
from dist_subspace.placement.tensors import is_partitioned
from dist_subspace.subspace import SubspaceConfig, TrainedModule, attached, keeps_factors, resolve


def switch_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Local but for the agreement on errors: give a model the values of another adapter; returns the model.

    That is how checkpoints of a run, or runs of one configuration, are compared on one model, without loading the base again.

    Arguments:
        model: with an adapter on it, whole on this process.
        path: an adapter, a checkpoint or a run, of the same method, settings and layers.

    Raises:
        UsageError: an adapter of another method, with other settings or layers, or of a method whose base or factors are made
            from the base model; a model whose weights are split. The model has its former adapter then.
    """
    with agreed("reading the adapter"):
        its = attached(model)
        adapter = AdapterFolder(adapter_folder(path), verify=True).whole().named_by(model).laid_out_for(model)
        if any(is_partitioned(p) for p in model.parameters()):
            raise UsageError(
                "the model's weights are split over the ranks; accepted: dist_subspace.load(path), or a model that is whole "
                "(preset zero0)"
            )
        if any(keeps_factors(model.get_submodule(name)) for name in its.layers):
            raise UsageError(
                f"an adapter of method {its.info.name} keeps factors of its base; accepted: dist_subspace.load(path)"
            )
        _check_alike(f"the adapter of {str(path)!r}", adapter, model)
    _, trained = split_factors(adapter.tensors)
    fill_adapter(model, trained)
    return model


def _check_alike(named: str, adapter: LoadedAdapter, model: nn.Module) -> None:
    its = attached(model)
    here, there = _computing(its.config), _computing(adapter.config)
    for name, value in here.items():
        if there[name] != value:
            raise UsageError(f"{named} has {name} {there[name]!r}, and the model's {value!r}; accepted: the same")
    held = {
        file_key(name, suffix): tuple(tensor.shape)
        for name, module in model.named_modules()
        if isinstance(module, TrainedModule)
        for suffix, tensor in module.file_tensors().items()
    }
    _, trained = split_factors(adapter.tensors)
    found = {key: tuple(tensor.shape) for key, tensor in trained.items()}
    for key in sorted(held.keys() | found.keys()):
        if held.get(key) != found.get(key):
            raise UsageError(
                f"{named} has {key} as {found.get(key)}, and the model's as {held.get(key)}; accepted: an adapter on the same "
                "layers, with the same ranks"
            )


def _computing(config: SubspaceConfig) -> dict[str, Any]:
    """The settings that decide what an adapter computes, beside its tensors."""
    settings = resolve(config).settings
    return {"method": config.method, "alpha": settings.alpha, "options": dict(settings.options)} | {
        "alpha_pattern": dict(config.alpha_pattern),
        "new_tokens": list(config.new_tokens),
    }
