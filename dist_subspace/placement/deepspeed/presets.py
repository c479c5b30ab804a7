"""DeepSpeed configurations by name. A stock JSON instead is resolved in `stock.py` and judged in `supported.py`."""

from __future__ import annotations

from typing import Any

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.placement.deepspeed.secondary import KEY
from dist_subspace.placement.deepspeed.thresholds import ENGINE_MANNERS, zero_thresholds

PRESETS = {
    "zero0": 0,
    "zero1": 1,
    "zero2": 2,
    "zero3": 3,
    "zero3-hpz": 3,
    "zero2-offload": 2,
    "zero3-offload": 3,
    "zero3-nvme": 3,
}
HIERARCHICAL = "zero3-hpz"
_NVME_BUFFER = 100_000_000  # elements; a smaller one than the largest shard stops the swapper


def deepspeed_config(
    preset: str,
    *,
    micro_batch: int,
    rounds: int,
    world_size: int,
    trainable_numel: int = 0,
    block_numel: int = 0,
    max_grad_norm: float,
    nvme_path: str | None = None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """The DeepSpeed configuration of a preset.

    The engine runs in fp32: neither bf16 nor fp16 is named, so it leaves 16-bit and packed frozen weights as they are and
    keeps adapters in fp32, at every stage. The computation's type is the model's.

    Arguments:
        micro_batch: samples (or packed rows) of a micro-batch.
        rounds: micro-batches of a rank in one optimizer step, the empty ones included.
        trainable_numel: elements that are trained; 0 before the method is attached.
        block_numel: stored elements of one decoder block; 0 where unknown.
        max_grad_norm: largest norm of the global gradient; 0 for no clipping.
        nvme_path: folder for zero3-nvme, which needs one.
        ranks_per_node: for zero3-hpz, which needs it (`nodes.ranks_per_node`).

    Raises:
        UsageError: an unknown preset, or zero3-hpz without its number.
    """
    if preset not in PRESETS:
        raise unknown_name("deepspeed.preset", preset, PRESETS)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": rounds,
        "train_batch_size": micro_batch * rounds * world_size,
        "gradient_clipping": float(max_grad_norm),
        "zero_optimization": {
            **_zero_section(preset, trainable_numel, block_numel, nvme_path),
            **_hierarchy(preset, ranks_per_node),
        },
        **ENGINE_MANNERS,
    }


def _hierarchy(preset: str, ranks_per_node: int | None) -> dict[str, Any]:
    """Weights are gathered from second shards inside a node: packed bytes never cross the links between nodes in a step."""
    if preset != HIERARCHICAL:
        return {}
    if ranks_per_node is None:
        raise UsageError(
            f"deepspeed.preset is {preset!r}, which needs the number of ranks of a node; accepted: from 2 on"
        )
    return {KEY: ranks_per_node}


def _zero_section(preset: str, trainable_numel: int, block_numel: int, nvme_path: str | None) -> dict[str, Any]:
    stage = PRESETS[preset]
    if stage == 0:
        return {"stage": 0}
    section: dict[str, Any] = {
        "stage": stage,
        # Gradients are copied into the one bucket as they come, and freed: a copy of adapter size, once.
        "contiguous_gradients": True,
        # At stage 3 it lets gathers run beside the computation, on a stream of their own; below, where no weight is gathered,
        # it would only double the buckets of an adapter.
        "overlap_comm": stage == 3,
        **zero_thresholds(stage, trainable_numel, block_numel),
    }
    if preset.endswith(("-offload", "-nvme")):
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if preset == "zero3-offload":
        section["offload_param"] = {"device": "cpu", "pin_memory": True}
    if preset == "zero3-nvme":
        section["offload_param"] = {
            "device": "nvme",
            "nvme_path": nvme_path,
            "pin_memory": True,
            "max_in_cpu": 0,  # the default, 1e9 elements, would keep most models in CPU memory
            "buffer_size": max(_NVME_BUFFER, block_numel),
        }
    return section
