"""What a host sends over its cable in an optimizer step; started on each rank by torchrun.

    python -m tests.cluster.link MODEL PRESET FOLDER RATE [RATE ...]

After some steps each rank waits for FOLDER/RATE.go, and then counts. The first rank of each host writes FOLDER/RATE-HOST.json.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.launchers import enter
from dist_subspace.placement.collectives import barrier, world
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.nodes import ranks_per_node
from dist_subspace.placement.process_group import leave_process_group, meet_ranks
from dist_subspace.placement.tensors import full_numel
from dist_subspace.placement.traffic import sizes_of, step_traffic
from dist_subspace.subspace import parameter_groups, trainable_parameters
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss
from tests.matrix import tiny

WARM, STEPS = 3, 4
TOKENS = 8  # of a row: there is little to compute


def main(model_folder: str, preset: str, folder: str, *rates: str) -> None:
    enter()
    meet_ranks()
    torch.set_num_threads(1)
    node = ranks_per_node(preset)
    engine, formula = _made(model_folder, preset, node)
    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(world().rank))
    batch = MicroBatch(0, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), ids.numel())
    for _ in range(WARM):
        _step(engine, batch)
    for rate in rates:
        _wait_for(Path(folder) / f"{rate}.go")
        barrier()
        sent, began = sent_bytes(), time.monotonic()
        for _ in range(STEPS):
            _step(engine, batch)
        barrier()
        found = {"sent": (sent_bytes() - sent) / STEPS, "seconds": (time.monotonic() - began) / STEPS}
        if world().local_rank == 0:
            written = Path(folder) / f".{rate}-{socket.gethostname()}"
            written.write_text(json.dumps(found | {"formula": formula}))
            written.rename(Path(folder) / f"{rate}-{socket.gethostname()}.json")
    leave_process_group()


def _step(engine: Any, batch: MicroBatch) -> None:
    """As a run makes it: the formula is that of its loss, which is made inside the head."""
    engine.backward(micro_batch_loss(engine, batch, torch.device("cpu")))
    engine.step()


def _made(model_folder: str, preset: str, node: int) -> tuple[Any, dict[str, Any]]:
    """The engine, and what the formula says."""
    size = world().size
    numbers: dict[str, Any] = {"micro_batch": 1, "rounds": 1, "world_size": size, "max_grad_norm": 1.0}
    numbers["ranks_per_node"] = node
    model = load_frozen(model_folder, storage="nf4", dtype="float32", deepspeed=deepspeed_config(preset, **numbers))
    attach(model, SubspaceConfig(method="lora", rank=4)).train()
    sizes = sizes_of(model, [group["params"] for group in parameter_groups(model, tiny.RATE)])
    numbers["trainable_numel"] = sum(map(full_numel, trainable_parameters(model)))
    config = deepspeed_config(preset, **numbers, block_numel=largest_block_numel(model))
    engine = tiny.make_engine(model, config, lambda p, lr: tiny.adam(parameter_groups(model, lr), lr))
    sent = step_traffic(sizes, PRESETS[preset], size, node, second_shards=preset == "zero3-hpz")
    return engine, asdict(sent) | {"by_node": sent.total.by_node, "frozen": sizes.frozen_bytes}


def sent_bytes(card: str = "eth0") -> int:
    """That have left by a network card of this process's network (`/sys` would be that of another one)."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith(f"{card}:"))
    return int(line.partition(":")[2].split()[8])


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
