"""ZeRO's thresholds. They count elements of the stored type, whatever these weigh, and their defaults are for full training."""

from __future__ import annotations

from typing import Any

_GRAIN = 65536  # elements; buckets are rounded up to it, and are at least one
_LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's own default, allocated whole

# How the engine behaves whatever the stage: our optimizers are accepted, on a CPU too, and it prints nothing.
ENGINE_MANNERS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31 - 1,
    "wall_clock_breakdown": False,
}


def bucket_size(trainable_numel: int) -> int:
    """Elements of a reduce or all-gather bucket that takes all trained parameters at once, where that is affordable."""
    grains = max(1, -(-trainable_numel // _GRAIN))
    return min(grains * _GRAIN, _LARGEST_BUCKET)


def zero_thresholds(stage: int, trainable_numel: int, block_numel: int) -> dict[str, Any]:
    """Thresholds of the `zero_optimization` section for a stage.

    Arguments:
        trainable_numel: elements that are trained.
        block_numel: stored elements (packed bytes, statistics) of one decoder block; 0 where unknown: then nothing is
            fetched ahead or kept for reuse, which is slow and never wrong.
    """
    if stage == 0:
        return {}
    bucket = bucket_size(trainable_numel)
    sizes: dict[str, Any] = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        sizes |= {
            # Above 0, every weight of a small model would stay whole on every rank.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": block_numel,
            "stage3_max_live_parameters": 2 * block_numel,
            "stage3_max_reuse_distance": block_numel,
        }
    return sizes
