"""`generate` of a model that is split over ranks: every rank goes on until the longest text has ended.

A rank whose texts have ended would stop calling modules, and the others would wait for its shards for ever. It keeps them
company instead: as long as another rank writes, it calls the model with one token. transformers' own `synced_gpus` goes on with
the texts that have ended, whose cache grows and whose positions leave the model's table at last; transformers sets it only where
its own Trainer configured DeepSpeed, and Seq2SeqTrainer passes False where it did not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import is_encoder_decoder
from dist_subspace.placement.collectives import sum_over_ranks
from dist_subspace.placement.deepspeed.shards import is_registered
from dist_subspace.placement.tensors import is_split


def keep_ranks_together(model: nn.Module) -> None:
    """Let the model's `generate` keep the ranks in step where its weights are split over several, whenever that comes to be."""
    if hasattr(type(model), "generate") and "generate" not in model.__dict__:
        # A partial and no closure: a deep copy of the model gets one of its own.
        model.generate = functools.partial(_generate, model)  # type: ignore[assignment]


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_split(model):
        return type(model).generate(model, *args, **kwargs)
    if not is_registered(model):
        raise UsageError(
            "the model's weights are split over the ranks, and nothing gathers them yet; generate works after "
            "deepspeed.initialize (engine.module.generate)"
        )
    kwargs["synced_gpus"] = False  # the texts are the same, and the company below is enough
    with _Company(model):
        return type(model).generate(model, *args, **kwargs)


class _Company:
    """Collective: within the block each forward of the model waits for a forward of every other rank, and at its end this rank
    goes on with calls of one token until no rank writes any more.

    A rank whose `generate` raises between two forwards keeps the others company too, and raises then. One that raises inside a
    forward, or before the decoder of an encoder-decoder was called, leaves the others in a collective.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.inside = model, False
        self.encoded: dict[str, Any] = {}  # what the decoder of an encoder-decoder needs to be called

    def __enter__(self) -> None:
        self.hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after),
        ]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.inside or (is_encoder_decoder(self.model) and not self.encoded):
            return
        with torch.no_grad():
            while _someone_writes(False):
                self.model(**self._one_token())

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _someone_writes(True)
        self.inside = True
        self.encoded = {name: kwargs[name] for name in ("encoder_outputs", "attention_mask") if name in kwargs}

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.inside = False

    def _one_token(self) -> dict[str, Any]:
        device = self.model.device
        if not is_encoder_decoder(self.model):
            return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device), "use_cache": False}
        rows = len(self.encoded["encoder_outputs"][0])
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        return {"decoder_input_ids": ids, "use_cache": False, **self.encoded}


def _someone_writes(this_rank: bool) -> bool:
    """Collective: whether any rank has a forward of its own to make."""
    return sum_over_ranks([float(this_rank)])[0] > 0
