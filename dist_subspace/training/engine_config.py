"""What configures the engine of a run: a preset sized by the model, or a stock JSON that agrees with the YAML."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dist_subspace.config import Config, fill_unset
from dist_subspace.placement.collectives import world
from dist_subspace.placement.engines import engine_config as configured
from dist_subspace.placement.engines import largest_block, stock_training_keys
from dist_subspace.placement.facts import Facts
from dist_subspace.storage import storage_info
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.plan import Plan
from dist_subspace.training.schedule import warmup_count


def engine_config(plan: Plan, model: nn.Module | None) -> dict[str, Any] | None:
    """What configures DeepSpeed's engine, None where another trains; before there is a model, what `load_frozen` splits by.

    Raises:
        UsageError: a stock JSON that contradicts the YAML, or a combination that is known to be broken.
    """
    section, storage = plan.config.deepspeed, plan.config.model.storage
    trained = sum(p.numel() for p in trainable_parameters(model)) if model is not None else 0
    facts = _facts(plan, trained, largest_block(model) if model is not None else 0)
    unquantised = storage_info(storage).dtype is not None
    return configured(
        section.preset, section.config, section.nvme_path, facts, storage=storage, unquantised=unquantised
    )


def _facts(plan: Plan, trained: int, block: int) -> Facts:
    training = plan.config.training
    return Facts(
        micro_batch=training.per_device_train_batch_size,
        global_batch=plan.batches.global_batch_size,
        rounds=math.ceil(plan.batches.micro_per_step / world().size),
        world_size=world().size,
        max_grad_norm=training.max_grad_norm,
        learning_rate=training.rate,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        warmup_steps=warmup_count(training.warmup_steps, plan.total_steps),
        total_steps=plan.total_steps,
        dtype=_name(plan),
        trainable_numel=trained,
        block_numel=block,
        optim=training.optim,
        lr_scheduler_type=training.lr_scheduler_type,
        ranks_per_node=plan.ranks_per_node,
    )


def with_stock_choices(config: Config) -> Config:
    """The configuration with optimizer and schedule taken from a stock JSON where the YAML leaves them open."""
    if config.deepspeed.config is None:
        return config
    return fill_unset(config, stock_training_keys(config.deepspeed.config))


def _name(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")
