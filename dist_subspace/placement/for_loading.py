"""What a load asks of a placement: whether its tensors are split as they come, and what is prepared at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.available import deepspeed_is_missing
from dist_subspace.placement.deepspeed.cpp_helpers import check_nvme_helpers
from dist_subspace.placement.deepspeed.expert_lists import watch_expert_lists
from dist_subspace.placement.deepspeed.in_place import use_in_place
from dist_subspace.placement.deepspeed.json_file import read_deepspeed, zero_stage
from dist_subspace.placement.deepspeed.leaf_blocks import mark_leaf_blocks
from dist_subspace.placement.deepspeed.partitioner import Partitioner, remember_partitioner
from dist_subspace.placement.deepspeed.partitioner import outside_zero_init as outside_zero_init
from dist_subspace.placement.deepspeed.process_group import agreed_device, ensure_process_group
from dist_subspace.placement.generation import keep_ranks_together
from dist_subspace.placement.protocol import Splitter
from dist_subspace.placement.replicas import Replicas

Given = Mapping[str, Any] | str | Path  # a DeepSpeed configuration, or its JSON's path


def join_ranks() -> None:
    """Collective: make the process group of DeepSpeed if there is none.

    Raises:
        UsageError: DeepSpeed cannot be imported.
    """
    missing = deepspeed_is_missing()
    if missing is not None:
        raise UsageError(
            f"a DeepSpeed configuration is given, but DeepSpeed cannot be imported here ({missing}); accepted without it: "
            "deepspeed=None, or deepspeed.preset none in a run"
        )
    ensure_process_group()


def read_placement(given: Given | None) -> dict[str, Any] | None:
    """Local: the configuration as a dict; None for weights that stay whole.

    Raises:
        UsageError: it cannot be read, or asks for helpers that are not here.
    """
    if given is None:
        return None
    config = read_deepspeed(given)
    check_nvme_helpers(config)
    return config


def loading_device(device: torch.device | str | None, *, alone: bool) -> torch.device:
    """Local: where whole parameters go; unset: the accelerator, else the CPU."""
    if device is None and not alone:
        return agreed_device()
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def splitter_of(config: Mapping[str, Any] | None, device: torch.device | str | None = None) -> Splitter:
    """What takes parameters as they are read: split over the ranks at ZeRO stage 3, else whole on each; for this process alone
    where there is no configuration. Collective where there is one.

    Arguments:
        device: where whole parameters go; unset: the accelerator, else the CPU.
    """
    if config is None:
        return Replicas(loading_device(device, alone=True), alone=True)
    if zero_stage(config) == 3:
        return Partitioner(dict(config))
    return Replicas(loading_device(device, alone=False), alone=False)


def casting_section(config: Mapping[str, Any] | None) -> tuple[str, int] | None:
    """The section of a 16-bit engine that casts every floating parameter, and its ZeRO stage; None where nothing is cast."""
    stage = 3 if config is None else zero_stage(config)
    kinds = [kind for kind in ("fp16", "bf16") if (config or {}).get(kind, {}).get("enabled") is True]
    return (kinds[0], stage) if kinds and stage < 3 else None


def prepare_blocks(model: nn.Module, splitter: Splitter | None = None) -> None:
    """Local, alike on every rank: what an engine finds when it comes to split the model over ranks. Nothing without one.

    Arguments:
        splitter: what has split the model's weights; what is added to it later is split so too.
    """
    if isinstance(splitter, Partitioner):
        remember_partitioner(model, splitter)
    mark_leaf_blocks(model)
    watch_expert_lists(model)
    keep_ranks_together(model)
    use_in_place(model)
