"""Engines of the tiny models: their configurations, batches that are dealt to the ranks, and what steps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.engine import DeepSpeedEngine
from dist_subspace.placement.engines import start_engine
from dist_subspace.placement.protocol import Engine
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.engine import Stepper
from tests.matrix import tiny
from tests.whole_runs import configuration

CPU = torch.device("cpu")
KINDS = {None: "float32", "bf16": "bfloat16", "fp16": "float16"}


def micro_batch(number: int) -> MicroBatch:
    """One row; the number of its targets grows with its number, so that a mean of means would be another loss."""
    ids = torch.randint(3, tiny.VOCABULARY, (1, tiny.LENGTH), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, : tiny.LENGTH - 2 - number] = -100
    return MicroBatch(
        number=number, inputs={"input_ids": ids}, labels=labels, targets=number + 2, samples=1, tokens=tiny.LENGTH
    )


def global_batch(count: int) -> GlobalBatch:
    """`count` micro-batches dealt to the ranks in turn; the last round may leave ranks without one."""
    rank, size = world().rank, world().size
    rounds = math.ceil(count / size)
    own = [micro_batch(n) if n < count else None for n in (r * size + rank for r in range(rounds))]
    targets = sum(n + 2 for n in range(count))
    return GlobalBatch(0, own, micro_batch(0), targets=targets, samples=count, tokens=count * tiny.LENGTH, epoch=0.0)


def stepper_of(folder: str, stage: int | None, rounds: int) -> tuple[Engine, Stepper]:
    """stage: of ZeRO; None for the engine of plain torch."""
    size = world().size
    config = tiny.ds_config(stage or 0, trainable_numel=4096, world_size=size)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rounds,
        "train_batch_size": rounds * size,
    }
    used = None if stage is None else config
    model = load_frozen(folder, storage="nf4", dtype="float32", deepspeed=used)
    attach(model, SubspaceConfig(method="lora", rank=3)).train()
    assert sum(full_numel(p) for p in trainable_parameters(model)) <= 4096
    engine = start_engine(model, tiny.adam(trainable_parameters(model), tiny.RATE), used, 0.0)
    return engine, Stepper(engine, CPU, 0, size)


def close(engine: Engine) -> None:
    if isinstance(engine, DeepSpeedEngine):
        engine.deepspeed.destroy()


def stock(stage: int, kind: str | None, *offload: str, **more: Any) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage} | {target: {"device": "cpu"} for target in offload}
    scale = {"initial_scale_power": 8} if kind == "fp16" else {}
    return {"zero_optimization": section, **({kind: {"enabled": True} | scale} if kind else {}), **more}


def config_of(
    folder: Path, run: Path, engine: dict[str, Any], kind: str | None, optim: str = "adamw_torch"
) -> dict[str, Any]:
    values = configuration(folder, run, max_steps=4, global_batch_size=4, optim=optim, warmup_steps=0)
    values["training"] |= {"gradient_checkpointing": False, "lr_scheduler_type": "constant"}
    values["model"] |= {"storage": "nf4", "dtype": KINDS[kind]}
    values["checkpoint"] = {"save_steps": 2}
    return values | {"deepspeed": {"config": engine}}
