"""Which engine trains, and what configures it: `deepspeed.preset` chooses, and a stock JSON in its place means DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_subspace import launchers
from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed import stock
from dist_subspace.placement.deepspeed.available import deepspeed_is_missing
from dist_subspace.placement.deepspeed.in_place import GATHERED as GATHERED
from dist_subspace.placement.deepspeed.in_place import IN_PIECES as IN_PIECES
from dist_subspace.placement.deepspeed.in_place import LOOKED_UP as LOOKED_UP
from dist_subspace.placement.deepspeed.in_place import pieces_of as pieces_of
from dist_subspace.placement.deepspeed.in_place import use_of as use_of
from dist_subspace.placement.deepspeed.json_file import read_deepspeed
from dist_subspace.placement.deepspeed.json_file import zero_stage as stage_of
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.placement.deepspeed.presets import HIERARCHICAL, PRESETS, deepspeed_config
from dist_subspace.placement.deepspeed.process_group import agreed_device
from dist_subspace.placement.deepspeed.quiet import be_quiet as be_quiet
from dist_subspace.placement.deepspeed.secondary import check_partition_size
from dist_subspace.placement.deepspeed.supported import check_supported
from dist_subspace.placement.facts import Facts
from dist_subspace.placement.nodes import ranks_per_node
from dist_subspace.placement.protocol import Engine

WHOLE = "none"
ALL_PRESETS = (WHOLE, *PRESETS)
Stock = Mapping[str, Any] | str | Path


def check_engine(preset: str, given: Stock | None) -> None:
    """Local: refuse what cannot train here.

    Arguments:
        given: `deepspeed.config`, which stands in the place of the preset.

    Raises:
        UsageError: several ranks without DeepSpeed's engine, or an engine of DeepSpeed where it cannot be imported.
    """
    ranks = max(world().size, launchers.read(os.environ).size)
    if _trains_whole(preset, given):
        if ranks > 1:
            raise UsageError(
                f"deepspeed.preset is 'none', which trains on one process, but there are {ranks} ranks; accepted with several: "
                f"{', '.join(PRESETS)}"
            )
        return
    missing = deepspeed_is_missing()
    if missing is not None:
        what = "deepspeed.config is given" if given is not None else f"deepspeed.preset is {preset!r}"
        raise UsageError(
            f"{what}, but DeepSpeed cannot be imported here ({missing}); accepted without it: deepspeed.preset none, on one "
            "process"
        )


def stock_digest(given: Stock | None) -> str | None:
    """Local: a short hash of what a stock JSON says, wherever it and the disk for offloading lie; None for none."""
    if given is None:
        return None
    stated = read_deepspeed(given)
    for section in ("offload_param", "offload_optimizer"):
        zero = stated.get("zero_optimization")
        if isinstance(zero, dict) and isinstance(zero.get(section), dict):
            zero[section].pop("nvme_path", None)
    text = json.dumps(stated, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _trains_whole(preset: str, given: Stock | None) -> bool:
    """Whether plain torch trains: a stock JSON means DeepSpeed, whatever the preset is."""
    return given is None and preset == WHOLE


def ranks_per_near_group(preset: str, given: Stock | None) -> int | None:
    """Collective: how many ranks each node has, where the preset keeps second shards inside nodes; else None.

    Raises:
        UsageError: on every rank, where the nodes are not alike or there is but one.
    """
    return ranks_per_node(preset) if given is None and preset == HIERARCHICAL else None


def engine_title(preset: str, given: Stock | None) -> str:
    """What a notice calls the engine."""
    return "torch's engine" if _trains_whole(preset, given) else "DeepSpeed's engine"


def compute_device(preset: str, given: Stock | None) -> torch.device:
    """Where this rank computes."""
    if _trains_whole(preset, given):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return agreed_device()


def engine_config(
    preset: str, given: Stock | None, nvme_path: str | None, facts: Facts, *, storage: str, unquantised: bool
) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a preset, or of a stock JSON; None where DeepSpeed does not train.

    Raises:
        UsageError: a stock JSON that contradicts the facts, or a combination that is known to be broken.
    """
    if _trains_whole(preset, given):
        return None
    if given is not None:
        made = stock.stock_config(given, facts)
    else:
        made = deepspeed_config(
            preset,
            micro_batch=facts.micro_batch,
            rounds=facts.rounds,
            world_size=facts.world_size,
            max_grad_norm=facts.max_grad_norm,
            trainable_numel=facts.trainable_numel,
            block_numel=facts.block_numel,
            nvme_path=nvme_path,
            ranks_per_node=facts.ranks_per_node,
        )
    check_partition_size(made, facts.world_size)
    check_supported(made, storage=storage, unquantised=unquantised, dtype=facts.dtype)
    return made


def stock_training_keys(given: Stock) -> dict[str, Any]:
    """What a stock JSON's optimizer and scheduler are called in the YAML, and the learning rate that they name.

    Raises:
        UsageError: an optimizer or scheduler that has no counterpart.
    """
    return stock.stock_training_keys(read_deepspeed(given))


def without_training_sections(given: Stock) -> dict[str, Any]:
    """A stock JSON without its optimizer and its scheduler, which the YAML stands for."""
    return {key: value for key, value in read_deepspeed(given).items() if key not in ("optimizer", "scheduler")}


def zero_stage(given: Stock) -> int:
    """The ZeRO stage of a stock JSON."""
    return stage_of(read_deepspeed(given))


def largest_block(model: nn.Module) -> int:
    """Stored frozen elements of the largest decoder block, by which DeepSpeed's buffers are sized."""
    return largest_block_numel(model)


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any] | None, max_grad_norm: float
) -> Engine:
    """Collective: the engine that `engine_config` has configured.

    Arguments:
        max_grad_norm: as in the configuration, for the engine that has none.
    """
    if config is None:
        from dist_subspace.placement.whole.engine import WholeEngine

        return WholeEngine(model, optimizer, max_grad_norm)
    from dist_subspace.placement.deepspeed.engine import DeepSpeedEngine, initialize

    return DeepSpeedEngine(initialize(model, optimizer, config))


def preset_for_use(preset: str | None, given: Stock | None, ranks: int) -> str:
    """The preset under which a trained model is only called: the split and the offloading of its training, without what is
    trained. On one rank a model that lay on the device alone is whole.

    Arguments:
        preset, given: `deepspeed.preset` and `deepspeed.config` of the training; None where nobody knows them.
    """
    if given is not None:
        section = read_deepspeed(given).get("zero_optimization") or {}
        device = (section.get("offload_param") or {}).get("device", "none")
        preset = {"cpu": "zero3-offload", "nvme": "zero3-nvme"}.get(device, f"zero{stage_of(read_deepspeed(given))}")
    if preset in ("zero3-offload", "zero3-nvme"):
        return preset
    if ranks == 1:
        return WHOLE
    return "zero3" if preset is not None and PRESETS.get(preset) == 3 else "zero0"


def use_config(
    preset: str, nvme_path: str | None, *, dtype: str, storage: str, unquantised: bool, block_numel: int = 0
) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a model that is only called; None for a whole one.

    Raises:
        UsageError: an unknown preset, several ranks without DeepSpeed, or a combination that is known to be broken.
    """
    if preset not in ALL_PRESETS:
        raise unknown_name("preset", preset, ALL_PRESETS)
    check_engine(preset, None)
    ranks = world().size
    facts = Facts(
        micro_batch=1,
        global_batch=ranks,
        rounds=1,
        world_size=ranks,
        max_grad_norm=0.0,
        learning_rate=0.0,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
        warmup_steps=0,
        total_steps=1,
        dtype=dtype,
        block_numel=block_numel,
        ranks_per_node=ranks_per_near_group(preset, None),
    )
    return engine_config(preset, None, nvme_path, facts, storage=storage, unquantised=unquantised)


def start_use(model: nn.Module, config: Mapping[str, Any] | None) -> Callable[[], None]:
    """Collective: let a model that is loaded by `use_config` be called and generate. Returns what ends that."""
    if config is None or stage_of(config) < 3:
        return lambda: None
    from dist_subspace.placement.deepspeed.engine import gather_when_called

    return gather_when_called(model, config)
