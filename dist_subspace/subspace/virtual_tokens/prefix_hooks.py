"""How a stack of blocks gets the virtual keys and values of prefix-tuning, and how its tokens move behind them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dist_subspace.families.configuration import config_of, text_config
from dist_subspace.families.positions import first_position
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.segments import longest_sample
from dist_subspace.subspace.virtual_tokens.slots import CollectGradients, Slot


class PrefixPart(Protocol):
    """The part of prefix-tuning: called, it gives its matrix; `pieces` are the keys and values of some layers in it."""

    enabled: bool
    count: int

    def __call__(self) -> Tensor: ...

    def pieces(self, matrix: Tensor, layers: slice) -> list[Tensor]: ...


class PrefixHooks:
    """Gives one stack's self-attention layers their columns of a part's matrix, and moves the tokens' positions behind them.

    Arguments:
        slots: of the stack's self-attention layers, in their order.
        layers: where these layers stand among those of the whole model.
    """

    def __init__(self, part: PrefixPart, model: nn.Module, stack: nn.Module, slots: list[Slot], layers: slice) -> None:
        self.part, self.slots, self.layers = part, slots, layers
        self.config = text_config(config_of(model))
        self.first, self.waiting = first_position(stack), False
        stack.register_forward_pre_hook(self.before_stack, with_kwargs=True)
        stack.register_forward_hook(self.after_stack)
        stacks.at_input(stack, self.fill_slots)

    def before_stack(
        self, stack: nn.Module, args: tuple[object, ...], kwargs: stacks.Arguments
    ) -> tuple[tuple[()], stacks.Arguments] | None:
        """Move the positions, and wait for the embeddings."""
        self.waiting = self.part.enabled
        if not self.waiting:
            return None
        arguments = stacks.named_arguments(stack, args, kwargs)
        past, length = stacks.cached_length(arguments), stacks.length_and_device(arguments)[1]
        longest = longest_sample(stacks.packed_edges(arguments), length)
        stacks.check_length(self.config, self.first, self.part.count, past + longest)
        if stacks.takes(stack, "position_ids"):
            # Where positions are given, a mask says nothing more; one that was made for a static cache is longer than they are.
            given = arguments.get("position_ids") is not None
            mask = None if given else stacks.padding_mask(arguments, past, "method prefix")
            arguments["position_ids"] = stacks.positions(stack, arguments, mask, past) + self.part.count
        if arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = self.fill_slots(arguments["inputs_embeds"])
        return (), arguments

    def fill_slots(self, embeddings: Tensor) -> Tensor | None:
        """Hand the layers their keys and values, once a forward; the embeddings pass, and collect the gradients."""
        if not self.waiting:
            return None
        self.waiting = False
        pieces = self.part.pieces(self.part(), self.layers)
        for slot, tokens in zip(self.slots, pieces, strict=True):
            slot.fill(tokens)
        trained = torch.is_grad_enabled() and any(tokens.requires_grad for tokens in pieces)
        return CollectGradients.apply(embeddings, self.slots, *pieces) if trained else embeddings

    def after_stack(self, stack: nn.Module, args: tuple[object, ...], output: object) -> None:
        for slot in self.slots:
            slot.tokens = None
