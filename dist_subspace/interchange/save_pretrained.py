"""`model.save_pretrained` of a model with a method: its adapter, as PEFT's models write theirs.

transformers' own would write the frozen base, packed as it is held, under names that no class of transformers reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import base_tokenizer, whole_adapter_tensors, write_adapter
from dist_subspace.interchange.base_model import identify_base
from dist_subspace.interchange.model_description import adapter_config
from dist_subspace.interchange.tokenizer_files import has_tokenizer
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import is_partitioned, with_data


def write_adapters_only(model: Any, identify: Callable[[Path], str]) -> None:
    """Local: from now on the model's `save_pretrained` writes its adapter. A partial and no closure: a copy of the model gets one
    of its own.

    Arguments:
        identify: the fingerprint of a model folder.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = functools.partial(_save_pretrained, model, identify)


def _save_pretrained(
    model: nn.Module,
    identify: Callable[[Path], str],
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Local: write the adapter on rank 0; other ranks need not call it.

    Arguments:
        state_dict: whole tensors by name, where ZeRO-3 has split the model's; an empty one, which transformers' Trainer gives
            before it lets the engine write everything, writes nothing.
        options: of transformers' own method, which say how a model's weights are written.

    Raises:
        UsageError: for weights that are split and not given.
    """
    if push_to_hub:
        raise UsageError("save_pretrained has push_to_hub; accepted: `dist-subspace push`, once the adapter is written")
    if not (is_main_process and world().is_main):
        return
    split = {name: p for name, p in model.named_parameters(remove_duplicate=False) if is_partitioned(p)}
    if split and state_dict is not None and not state_dict:
        return
    absent = [name for name, p in split.items() if p.requires_grad and name not in (state_dict or {})]
    if absent:
        raise UsageError(
            f"save_pretrained finds the weights split over the ranks ({absent[0]}); accepted: dist_subspace.save_adapter, called "
            "by every rank, or under a Trainer dist_subspace.TrainerMixin"
        )
    given = {p: (state_dict or {})[name] for name, p in split.items() if name in (state_dict or {})}
    with with_data(given) if given else nullcontext():
        tensors = whole_adapter_tensors(model)
    described, folder = adapter_config(model), Path(save_directory)
    identify_base(described, getattr(getattr(model, "config", None), "name_or_path", None), identify)
    write_adapter(folder, tensors, described, None if has_tokenizer(folder) else base_tokenizer(model))
