"""Samples that share a row must not see one another: positions restart, and attention stays inside a sample.

The only sign of a border is `position_ids`, which begins at 0 again. transformers (read: 5.23) turns that into a mask
of tokens x tokens where a model hands its positions to the mask function. The attention registered here does better:
it runs `scaled_dot_product_attention` on each sample by itself, causally, and no mask is ever made. It reads borders
from the `position_ids` that the model passes down to its attention with every call, so a recomputation under
activation checkpointing sees the same ones. A kernel that takes lengths (flash attention) gets them from the collator.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_subspace.errors import UsageError
from dist_subspace.subspace.virtual_tokens.segments import kernel_lengths, segments
from dist_subspace.training.data.samples import IGNORED
from dist_subspace.transformers_tables import attention_name

NAME = "dsub_packed"
SDPA = "sdpa"
LEAK_LIMIT = 1e-3
"""The most `packing_leak` of a model that may be trained packed (rounding is subtracted from it already; a random
hybrid of linear attention, whose state runs on from sample to sample, was seen at 7e-3)."""
NEAR = 16
"""Tokens beside the border that are compared: what leaks is felt there first, and the mean of a long sample would hide it (a
short convolution reaches over a few tokens)."""
AHEAD_LIMIT = 0.1
"""A change of the first sample, in units of the losses' spread, that cannot be rounding."""


def enable_packing(model: Any) -> None:
    """Make the model's attention keep packed samples apart, where transformers' own would build a mask for it.

    A model on flash attention, flex attention or eager attention keeps it; those separate samples themselves.

    Raises:
        UsageError: the model takes no `position_ids`, so a row can hold one sample only.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise UsageError(f"data.packing is true, but {type(model).__name__} takes no position_ids; accepted: false")
    if attention_name(model.config) == SDPA and hasattr(model, "set_attn_implementation"):
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, packed_mask)
        model.set_attn_implementation(NAME)


def takes_segment_lengths(model: nn.Module) -> bool:
    """Whether the model's attention kernel wants the lengths of segments among its inputs."""
    return "flash" in str(attention_name(model.config))


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for packed causal rows; in every other case (window, padding, cache, own patterns) the one of sdpa.

    transformers forbids the skip for packed rows, and for nothing else that comes here without cache, window or
    pattern of its own: so "no skip, whole rows, no padding" is a packed row.
    """
    plain = attention_mask is None and local_size is None and not use_vmap and not allow_is_bidirectional_skip
    if plain and not allow_is_causal_skip and q_length == kv_length > 1:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, called once for each segment of packed rows.

    query (b, heads, t, d), key and value (b, kv heads, t, d); the result is (b, t, heads, d). Grouped heads, scale
    and dropout are sdpa's own.
    """
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    separable = attention_mask is None and causal and kwargs.get("position_bias") is None
    if not separable or position_ids is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    edges_of_rows = segments(position_ids, query.shape[0])
    if edges_of_rows is None:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    rows: list[Tensor] = []
    for row, edges in enumerate(edges_of_rows):
        outputs = []
        for start, end in pairwise(edges):
            q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **options)[0])
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def packing_leak(model: nn.Module, sample_a: Tensor, sample_b: Tensor) -> float:
    """How much sample b's loss is changed by sample a standing before it in the same row; three forward passes.

    The mean change of b's first token losses, in units of their own spread (an untrained model's losses hardly differ, so a
    share of the loss itself would hide a leak), less what rounding does, as seen on sample a (nothing stands before
    it). Above LEAK_LIMIT the model mixes packed samples. Local, but under ZeRO-3 every rank must call it.

    Args:
        sample_a, sample_b: (n,) token ids, at least 3 each, on the model's device.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone_a, alone_b = _token_losses(model, [sample_a]), _token_losses(model, [sample_b])
            packed = _token_losses(model, [sample_a, sample_b])
    finally:
        model.train(training)
    first = len(alone_a)
    before = (packed[:first] - alone_a).abs()
    rounding = torch.stack([piece.mean() for piece in before.split(NEAR)]).max()  # as much as so few tokens show of it
    changed = (packed[first:] - alone_b)[:NEAR].abs().mean()
    spread = torch.cat([alone_a, alone_b]).std().clamp_min(1e-8)
    # A change of a itself far above rounding: the model looks ahead, into b.
    ahead = float(before.mean() / spread)
    behind = float((changed - 3 * rounding).clamp_min(0) / spread)
    return max(behind, ahead if ahead > AHEAD_LIMIT else 0.0)


def _token_losses(model: nn.Module, samples: list[Tensor]) -> Tensor:
    """(targets,) the loss of every target token of samples in one row, each sample's first token apart."""
    ids = torch.cat(samples)[None]
    positions = torch.cat([torch.arange(len(s), device=s.device) for s in samples])[None]
    labels = torch.cat([torch.cat([s.new_full((1,), IGNORED), s[1:]]) for s in samples])
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if takes_segment_lengths(model):
        inputs |= kernel_lengths(positions)
    logits = model(**inputs).logits[0].float()
    losses = cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="none")
    return losses[labels[1:] != IGNORED]
