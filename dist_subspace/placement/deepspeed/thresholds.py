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
    # The trained parameters' gradients are the only ones: one bucket takes them all, so that they are summed in one collective,
    # and no memory lies idle beside it (the default's buffer of 1 to 2 GB would, for an adapter of megabytes).
    bucket = bucket_size(trainable_numel)
    sizes: dict[str, Any] = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        sizes |= {
            # Above 0, every weight of a small model would stay whole on every rank. It decides by elements alone: at 70 billion
            # parameters a trained A has more than the default. Trained parameters are kept whole by name (`persistent.py`).
            "stage3_param_persistence_threshold": 0,
            # The next block comes while this one computes. More would only wait in memory: a block's product takes longer than
            # its gather, or the link is the limit, and then nothing that is fetched earlier helps.
            "stage3_prefetch_bucket_size": block_numel,
            # The block that computes and the one that comes; the default (1e9) would keep a whole 1B model in 4 bits gathered.
            "stage3_max_live_parameters": 2 * block_numel,
            # What is used again at once is kept, in loops that make a loss of whole logits: the head between its forward and its
            # backward, and the last block where little lies behind it. In ours the head is needed once.
            "stage3_max_reuse_distance": block_numel,
        }
    return sizes
