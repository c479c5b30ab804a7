"""Virtual keys and values in attention, whichever attention implementation the model runs on.

transformers (read: 5.23) has every refactored family call its attention through one table of functions, with the module as the
first argument. The modules that have a prefix get a view of their configuration that names the function here; it concatenates
and calls the implementation that the model's own configuration names at that moment. So masks are still made for that one, and it
may be changed at any time, before or after.

Where a mask is made, it gets columns of ones. Where none is (plain causal rows, or packed samples each by itself), n queries that
nobody reads stand before the real ones, and the causal kernel stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dist_subspace.errors import UsageError
from dist_subspace.families.attention import has_latent_keys, is_cross_attention, key_value_heads
from dist_subspace.families.blocks import shares_blocks
from dist_subspace.families.configuration import text_config
from dist_subspace.families.positions import first_position, has_learned_positions
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.segments import segments
from dist_subspace.torch_internals import in_backward
from dist_subspace.transformers_tables import (
    Attention,
    OtherAttention,
    attention_function,
    attention_name,
    calls_attention_by_name,
)

NAME = "dsub_prefix"


class Slot:
    """A layer's virtual keys and values, `(2, heads, n, d_head)` float32, for the attention call to find.

    Within a forward they are `tokens`, a part of autograd's graph. Reentrant checkpointing runs a block without a graph and again
    in backward, where gradients can only be left on something that is no result: `left`, a copy whose gradient `Arrive` takes.
    """

    def __init__(self, part: Any, heads: int, head_dim: int) -> None:
        self.part, self.heads, self.head_dim = part, heads, head_dim
        self.tokens: Tensor | None = None
        self.left: Tensor | None = None

    def give(self, tokens: Tensor) -> None:
        self.tokens = tokens
        if not torch.is_grad_enabled():
            return
        if self.left is None or (self.left.device, self.left.dtype) != (tokens.device, tokens.dtype):
            self.left = tokens.detach().clone().requires_grad_(True)
        else:  # the same tensor for every forward: whichever backward comes last finds what all have left
            self.left.data.copy_(tokens.detach())

    def take(self) -> Tensor | None:
        return self.left if in_backward() else self.tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        import copy

        return Slot(copy.deepcopy(self.part, memo), self.heads, self.head_dim)


class Arrive(torch.autograd.Function):
    """The input of the first block, unchanged. Its backward comes after that of every block: it takes what was left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: list[Slot], *tokens: Tensor) -> Tensor:
        ctx.slots = slots
        return x.clone()  # a view could not be changed in place by the model

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for slot in ctx.slots:
            left = slot.left
            found.append(None if left is None else left.grad)
            if left is not None:
                left.grad = None
        return g, None, *found


def attention_modules(model: nn.Module) -> list[list[nn.Module]]:
    """The self-attention modules of each of the model's stacks.

    Raises:
        UsageError: for a family whose attention does not go through transformers' table, or whose positions cannot be moved.
    """
    family = type(model).__name__
    kind, found = getattr(text_config(model.config), "model_type", None), []
    for stack in stacks.stacks(model):
        own = [
            module
            for name, module in stack.named_modules()
            if calls_attention_by_name(module)
            and not is_cross_attention(name, module)
            and getattr(module.config, "model_type", kind) == kind  # not the eyes and ears of a multimodal model
        ]
        if not own:
            raise UsageError(
                f"method prefix cannot reach the attention of {family}: it is not transformers' common one"
            )
        config: Any = stack.config
        if shares_blocks(config):
            raise UsageError(f"method prefix needs an attention for each layer, and those of {family} share one")
        if has_learned_positions(stack) and not stacks.takes(stack, "position_ids"):
            raise UsageError(f"method prefix cannot move the positions of {family}: it takes no position_ids")
        found.append(own)
    return found


def geometry(module: Any) -> tuple[int, int]:
    """(heads, width of a head) of an attention module's keys and values."""
    if has_latent_keys(module.config):
        raise UsageError(f"method prefix cannot stand before the latent keys of {type(module).__name__}")
    return key_value_heads(module)


def redirect(module: Any, slot: Slot) -> None:
    """Let the module's attention see the slot's keys and values."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_with_prefix)
    module.prefix_slot = slot
    module.config = OtherAttention(module.config, NAME)


def attention_with_prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """query `(b, heads, t, d)`, key and value `(b, kv heads, t_kv, d)`; gives `(b, t, heads, d)` and weights."""
    slot: Slot = module.prefix_slot
    tokens = slot.take() if slot.part.enabled else None
    with _own_configuration(module) as attend:
        if tokens is None:
            return attend(module, query, key, value, attention_mask, **options)
        if tokens.shape[1] != key.shape[1] or tokens.shape[3] != key.shape[3] or key.shape[3] != value.shape[3]:
            raise UsageError(
                f"method prefix: {type(module).__name__} has keys of {key.shape[1]} x {key.shape[3]} and values of "
                f"{value.shape[1]} x {value.shape[3]}, where {slot.heads} x {slot.head_dim} was expected of its family"
            )
        prefix = tokens.to(key.device, key.dtype)
        if "cu_seq_lens_q" in options:
            return _by_lengths(attend, module, query, key, value, prefix, options)
        return _whole_rows(attend, module, query, key, value, prefix, attention_mask, options)


@contextmanager
def _own_configuration(module: Any) -> Iterator[Attention]:
    """The implementation that the model's configuration names; within the block the module has that configuration itself."""
    view = module.config
    attend = attention_function(module, view.config)
    module.config = view.config
    try:
        yield attend
    finally:
        module.config = view


def _whole_rows(
    attend: Attention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    places = options.get("position_ids")
    options = options | ({"position_ids": None} if "position_ids" in options else {})
    # Flash attention says no mask for new tokens behind a filled cache too, and is causal from the end.
    behind_a_cache = key.shape[2] > query.shape[2] and "flash" in str(attention_name(module.config))
    if mask is not None or not causal or query.shape[2] == 1 or behind_a_cache:
        return _concatenated(attend, module, query, key, value, prefix, mask, options)
    key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # the rest of a static cache is empty yet
    edges = None if places is None or places.shape[-1] != query.shape[2] else segments(places, len(query))
    if edges is None:
        return _square(attend, module, query, key, value, prefix, options)
    rows = []
    for row, own in enumerate(edges):
        parts = [tuple(x[row : row + 1, :, a:b] for x in (query, key, value)) for a, b in pairwise(own)]
        rows.append(torch.cat([_square(attend, module, q, k, v, prefix, options)[0] for q, k, v in parts], dim=1))
    return torch.cat(rows), None


def _concatenated(
    attend: Attention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """With a mask, which every token's view of the prefix is added to; or without one, where every token sees all."""
    count = prefix.shape[2]
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise UsageError(
                f"method prefix cannot use the mask of attention {attention_name(module.config)}; accepted: sdpa"
            )
        mask = pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1)
    if options.get("position_bias") is not None:
        options = options | {"position_bias": pad(options["position_bias"], (count, 0))}
    return attend(module, query, *_before(prefix, key, value), mask, **options)


def _square(
    attend: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, prefix: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Causal rows without a mask: queries for the virtual tokens too, which are thrown away."""
    count = prefix.shape[2]
    if options.get("position_bias") is not None:
        options = options | {"position_bias": pad(options["position_bias"], (count, 0, count, 0))}
    output, weights = attend(module, pad(query, (0, 0, count, 0)), *_before(prefix, key, value), None, **options)
    return output[:, count:], None if weights is None else weights[:, :, count:]


def _by_lengths(
    attend: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, prefix: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A kernel that takes the lengths of packed samples (flash attention, causal from the end): the prefix stands before each."""
    edges, count = options["cu_seq_lens_k"].tolist(), prefix.shape[2]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (key, value)]
    longer = []
    for x, own in zip(flat, prefix, strict=True):
        pieces = [torch.cat([own.transpose(0, 1), x[a:b]]) for a, b in pairwise(edges)]
        longer.append(torch.cat(pieces)[None].transpose(1, 2))
    moved = options["cu_seq_lens_k"] + count * torch.arange(len(edges), device=key.device, dtype=torch.int32)
    options = options | {"cu_seq_lens_k": moved, "max_length_k": int(options["max_length_k"]) + count}
    return attend(module, query, longer[0], longer[1], None, **options)


def _before(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    own = prefix.unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat([own[0], key], dim=2), torch.cat([own[1], value], dim=2)


class Prefix:
    """Gives one stack's self-attention layers their rows of a part's matrix, and moves the tokens' positions behind them."""

    def __init__(self, part: Any, model: nn.Module, stack: nn.Module, slots: list[Slot], place: slice) -> None:
        self.part, self.stack, self.slots, self.place = part, stack, slots, place
        self.config = text_config(model.config)
        self.first, self.running = first_position(stack), False
        stack.register_forward_pre_hook(self.before, with_kwargs=True)
        stack.register_forward_hook(self.after)
        stacks.at_input(stack, self.embedded)

    def before(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        self.running = self.part.enabled
        if not self.running:
            return None
        arguments = stacks.named_arguments(stack, args, kwargs)
        past, length = stacks.cached_length(arguments), stacks.length_and_device(arguments)[1]
        edges = stacks.packed_edges(arguments)
        longest = length if edges is None else max(b - a for row in edges for a, b in pairwise(row))
        stacks.check_length(self.config, self.first, self.part.count, past + longest)
        if stacks.takes(stack, "position_ids"):
            given = (
                arguments.get("position_ids") is not None
            )  # then a mask, also one made for a static cache, says nothing more
            mask = None if given else stacks.padding_mask(arguments, past, "method prefix")
            arguments["position_ids"] = stacks.positions(stack, arguments, mask, past) + self.part.count
        if arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = self.embedded(arguments["inputs_embeds"])
        return (), arguments

    def embedded(self, rows: Tensor) -> Tensor | None:
        if not self.running:
            return None
        self.running = False
        pieces = self.part.pieces(self.part(), self.place)
        for slot, tokens in zip(self.slots, pieces, strict=True):
            slot.give(tokens)
        needed = torch.is_grad_enabled() and any(tokens.requires_grad for tokens in pieces)
        return Arrive.apply(rows, self.slots, *pieces) if needed else rows

    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for slot in self.slots:
            slot.tokens = None
