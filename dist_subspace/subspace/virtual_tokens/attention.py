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
from dist_subspace.families.configuration import config_of, text_config
from dist_subspace.families.positions import has_learned_positions
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.segments import segments
from dist_subspace.subspace.virtual_tokens.slots import Slot
from dist_subspace.transformers_tables import (
    Attention,
    OtherAttention,
    attention_function,
    attention_name,
    calls_attention_by_name,
)

NAME = "dsub_prefix"


def attention_modules(model: nn.Module) -> list[list[nn.Module]]:
    """The self-attention modules of each of the model's stacks.

    Raises:
        UsageError: for a family whose attention does not go through transformers' table, or whose positions cannot be moved.
    """
    family = type(model).__name__
    kind = getattr(text_config(config_of(model)), "model_type", None)
    by_stack: list[list[nn.Module]] = []
    for stack in stacks.stacks(model):
        modules = [
            module
            for name, module in stack.named_modules()
            if calls_attention_by_name(module)
            and not is_cross_attention(name, module)
            and getattr(module.config, "model_type", kind) == kind  # not the eyes and ears of a multimodal model
        ]
        if not modules:
            raise UsageError(
                f"method prefix cannot reach the attention of {family}: it is not transformers' common one"
            )
        if shares_blocks(config_of(stack)):
            raise UsageError(f"method prefix needs an attention for each layer, and those of {family} share one")
        if has_learned_positions(stack) and not stacks.takes(stack, "position_ids"):
            raise UsageError(f"method prefix cannot move the positions of {family}: it takes no position_ids")
        by_stack.append(modules)
    return by_stack


def geometry(module: nn.Module) -> tuple[int, int]:
    """(heads, width of a head) of an attention module's keys and values.

    Raises:
        UsageError: for keys and values that are made from one latent.
    """
    if has_latent_keys(config_of(module)):
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
    """The module's attention, with its slot's keys and values before its own.

    Arguments:
        query: `(b, heads, t, d)`; key, value: `(b, kv heads, t_kv, d)`.

    Returns:
        The output `(b, t, heads, d)`, and the weights where the implementation gives them.

    Raises:
        UsageError: keys of other heads than the model's configuration says, or a mask that is no tensor.
    """
    slot: Slot = module.prefix_slot
    tokens = slot.current() if slot.part.enabled else None
    with _model_configuration(module) as attend:
        if tokens is None:
            return attend(module, query, key, value, attention_mask, **options)
        if tokens.shape[1] != key.shape[1] or tokens.shape[3] != key.shape[3] or key.shape[3] != value.shape[3]:
            raise UsageError(
                f"method prefix: {type(module).__name__} has keys of {key.shape[1]} x {key.shape[3]} and values of "
                f"{value.shape[1]} x {value.shape[3]}, where {slot.heads} x {slot.head_dim} was expected of its family"
            )
        prefix = tokens.to(key.device, key.dtype)
        if "cu_seq_lens_q" in options:
            return _packed_by_lengths(attend, module, query, key, value, prefix, options)
        return _padded_rows(attend, module, query, key, value, prefix, attention_mask, options)


@contextmanager
def _model_configuration(module: Any) -> Iterator[Attention]:
    """The implementation that the model's configuration names; within the block the module has that configuration itself."""
    redirected = module.config
    attend = attention_function(module, redirected.config)
    module.config = redirected.config
    try:
        yield attend
    finally:
        module.config = redirected


def _padded_rows(
    attend: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    mask: object,
    options: stacks.Arguments,
) -> tuple[Tensor, Tensor | None]:
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    positions = options.get("position_ids")
    options = options | ({"position_ids": None} if "position_ids" in options else {})
    # Flash attention says no mask for new tokens behind a filled cache too, and is causal from the end.
    behind_a_cache = key.shape[2] > query.shape[2] and "flash" in str(attention_name(module.config))
    if mask is not None or not causal or query.shape[2] == 1 or behind_a_cache:
        return _concatenated(attend, module, query, key, value, prefix, mask, options)
    key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # the rest of a static cache is empty yet
    edges = None if positions is None or positions.shape[-1] != query.shape[2] else segments(positions, len(query))
    if edges is None:
        return _square(attend, module, query, key, value, prefix, options)
    rows = []
    for row, borders in enumerate(edges):
        samples = [tuple(x[row : row + 1, :, a:b] for x in (query, key, value)) for a, b in pairwise(borders)]
        rows.append(torch.cat([_square(attend, module, q, k, v, prefix, options)[0] for q, k, v in samples], dim=1))
    return torch.cat(rows), None


def _concatenated(
    attend: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    mask: object,
    options: stacks.Arguments,
) -> tuple[Tensor, Tensor | None]:
    """Rows with a mask, which gets columns by which every token sees the prefix; or without one, where every token sees all."""
    count = prefix.shape[2]
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise UsageError(
                f"method prefix cannot use the mask of attention {attention_name(module.config)}; accepted: sdpa"
            )
        mask = pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1)
    if options.get("position_bias") is not None:
        options = options | {"position_bias": pad(options["position_bias"], (count, 0))}
    return attend(module, query, *_prepended(prefix, key, value), mask, **options)


def _square(
    attend: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    options: stacks.Arguments,
) -> tuple[Tensor, Tensor | None]:
    """Causal rows without a mask. The virtual tokens get queries too, whose results are thrown away."""
    count = prefix.shape[2]
    if options.get("position_bias") is not None:
        options = options | {"position_bias": pad(options["position_bias"], (count, 0, count, 0))}
    output, weights = attend(module, pad(query, (0, 0, count, 0)), *_prepended(prefix, key, value), None, **options)
    return output[:, count:], None if weights is None else weights[:, :, count:]


def _packed_by_lengths(
    attend: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Tensor,
    options: stacks.Arguments,
) -> tuple[Tensor, Tensor | None]:
    """Packed samples for a kernel that takes their lengths (flash attention, causal from the end), each behind the prefix."""
    edges, count = options["cu_seq_lens_k"].tolist(), prefix.shape[2]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (key, value)]
    longer = []
    for x, virtual in zip(flat, prefix, strict=True):
        pieces = [torch.cat([virtual.transpose(0, 1), x[a:b]]) for a, b in pairwise(edges)]
        longer.append(torch.cat(pieces)[None].transpose(1, 2))
    moved = options["cu_seq_lens_k"] + count * torch.arange(len(edges), device=key.device, dtype=torch.int32)
    options = options | {"cu_seq_lens_k": moved, "max_length_k": int(options["max_length_k"]) + count}
    return attend(module, query, longer[0], longer[1], None, **options)


def _prepended(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `(b, heads, n + t, d_head)` with the prefix before those of every row."""
    rows = prefix.unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)
