"""What a run does with its model, seen from outside: hooks of torch's on the model and its layers, and DeepSpeed's engines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention

from dist_subspace.placement.whole.engine import WholeEngine


@dataclass
class Call:
    """One call of the model: its keyword arguments, whether it trains, and how torch was set meanwhile.

    held: elements of the model's parameters that were in this process when it began.
    """

    inputs: dict[str, Any]
    training: bool
    grad: bool
    deterministic: bool
    held: int

    @property
    def trains(self) -> bool:
        return self.training and self.grad

    @property
    def rows(self) -> list[list[int]]:
        """Token ids without the padding."""
        ids, mask = self.inputs["input_ids"], self.inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@dataclass
class Watched:
    """calls: of whole models in an engine, in their order. layers: whether gradients were recorded in each call of a layer's
    attention in training. engines: that DeepSpeed has made, and those of plain torch."""

    calls: list[Call] = field(default_factory=list)
    layers: list[bool] = field(default_factory=list)
    engines: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """What happens in this process meanwhile."""
    found = Watched()

    def of_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probe = kwargs.keys() <= {"input_ids", "use_cache"}  # a few tokens, to see what it makes of its head's result
        if not found.engines or probe:  # asked how it counts positions, and the like
            return
        kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        held = sum(parameter.numel() for parameter in module.parameters())
        deterministic = torch.are_deterministic_algorithms_enabled()
        found.calls.append(Call(kept, module.training, torch.is_grad_enabled(), deterministic, held))

    def of_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            found.layers.append(torch.is_grad_enabled())

    with (
        _hooked(LlamaForCausalLM, of_model),
        _hooked(LlamaForSequenceClassification, of_model),
        _hooked(LlamaAttention, of_layer),
        _engines(found.engines),
    ):
        yield found


@contextlib.contextmanager
def _hooked(kind: Any, hook: Callable[..., None]) -> Iterator[None]:
    """Every module of this class that is made meanwhile has the hook."""
    init = kind.__init__

    @functools.wraps(init)
    def hooked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_forward_pre_hook(hook, with_kwargs=True)

    kind.__init__ = hooked
    try:
        yield
    finally:
        kind.__init__ = init


@contextlib.contextmanager
def _engines(found: list[Any]) -> Iterator[None]:
    initialize = deepspeed.initialize

    @functools.wraps(initialize)
    def noted(*args: Any, **kwargs: Any) -> Any:
        made = initialize(*args, **kwargs)
        found.append(made[0])
        return made

    deepspeed.initialize = noted
    init = WholeEngine.__init__

    @functools.wraps(init)
    def noted_too(self: WholeEngine, *args: Any) -> None:
        init(self, *args)
        found.append(self)

    WholeEngine.__init__ = noted_too  # type: ignore[method-assign]
    try:
        yield
    finally:
        deepspeed.initialize, WholeEngine.__init__ = initialize, init  # type: ignore[method-assign]
