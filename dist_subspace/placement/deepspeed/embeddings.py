"""Frozen embeddings, which ZeRO-3 gathers for forward alone.

Read against deepspeed 0.19.8 (`runtime/zero/parameter_offload.py`). What each function relies on is in its docstring;
tests/placement/test_traffic.py fails when it moves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dist_subspace.placement.deepspeed.shards import is_partitioned


def spare_frozen_embeddings(model: nn.Module) -> None:
    """Local, after `initialize`: gather nothing when the gradient of a frozen embedding's output is there.

    Activation checkpointing needs an embedding's output that asks for a gradient, which DeepSpeed takes as a reason to gather the
    weight once more (`pre_bwd_fn`, an autograd function around the output): 2 GiB at 70 billion parameters, which nobody reads.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding) and all(is_partitioned(p) and not p.requires_grad for p in own):
            module.pre_bwd_fn = _Nothing  # type: ignore[assignment]


class _Nothing:
    @staticmethod
    def apply(output: Tensor) -> Any:
        return output
