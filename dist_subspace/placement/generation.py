"""`generate` of a model that is split over ranks: every rank goes on until the longest text has ended.

A rank whose texts have ended would stop calling modules, and the others would wait for its shards for ever. transformers'
argument `synced_gpus` prevents that; transformers sets it only where its own Trainer configured DeepSpeed, and Seq2SeqTrainer
passes False where it did not.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.shards import is_registered
from dist_subspace.placement.tensors import is_split


def keep_ranks_together(model: nn.Module) -> None:
    """Let the model's `generate` keep the ranks in step where its weights are split over several, whenever that comes to be."""
    if hasattr(type(model), "generate") and "generate" not in model.__dict__:
        # A partial and no closure: a deep copy of the model gets one of its own.
        model.generate = functools.partial(_generate, model)  # type: ignore[assignment]


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    if is_split(model):
        if not is_registered(model):
            raise UsageError(
                "the model's weights are split over the ranks, and nothing gathers them yet; generate works after "
                "deepspeed.initialize (engine.module.generate)"
            )
        kwargs["synced_gpus"] = True  # a False would end in a wait without end; the texts are the same
    return type(model).generate(model, *args, **kwargs)
