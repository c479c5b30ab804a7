"""How much memory a process has held, and what to lower when it was too much."""

from __future__ import annotations

import resource
import sys

import torch

from dist_subspace.training.loss import logits_memory


def peak_memory(device: torch.device) -> int:
    """Local: the most bytes this process has held, on its GPU, or in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(
    micro_batch: int,
    max_length: int,
    vocabulary: int,
    hidden: int,
    layers: int,
    checkpointing: bool,
    offloads: bool = True,
) -> str:
    """One sentence on what to lower, and about how much it would save on each rank.

    Counted: the logits (`logits_memory`), and the 16-bit activations that are kept for backward (one a block under
    checkpointing, about 16 without).

    Arguments:
        offloads: activations are kept in the computer's memory, or lie there anyway.
    """

    def taken(tokens: int) -> int:
        return logits_memory(tokens * vocabulary) + kept * tokens

    kept = 2 * hidden * layers * (1 if checkpointing else 16)  # bytes of a token
    tokens = micro_batch * max_length
    parts = []
    if micro_batch > 1:
        smaller = micro_batch // 2
        saved = taken(tokens) - taken(smaller * max_length)
        parts.append(f"training.per_device_train_batch_size={smaller} saves about {_gib(saved)}")
    else:
        parts.append(f"data.max_length={max_length // 2} saves about {_gib(taken(tokens) - taken(max_length // 2))}")
    if not checkpointing:
        parts.append(f"training.gradient_checkpointing=true saves about {_gib(kept * tokens * 15 / 16)}")
    elif not offloads:
        parts.append(f"training.activation_offload=true saves about {_gib(kept * tokens)}")
    parts.append("model.storage=nf4 or deepspeed.preset=zero3 shrink the frozen weights a rank keeps")
    return "out of memory: " + "; ".join(parts)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
