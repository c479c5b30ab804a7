"""A model's stacks of blocks (one; encoder and decoder), what their `forward` is given, and the positions of its tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import is_encoder_decoder, text_config
from dist_subspace.families.embeddings import input_embeddings
from dist_subspace.families.positions import first_position
from dist_subspace.subspace.virtual_tokens.segments import segments


def stacks(model: Any) -> list[nn.Module]:
    """The transformers modules that turn tokens into hidden states: encoder and decoder, or the innermost one that has the
    embeddings (a head may call that one without the base model around it)."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"virtual tokens need a transformers model, and {type(model).__name__} is none")
    if is_encoder_decoder(model):
        return [model.get_encoder(), model.get_decoder()]
    embeddings = input_embeddings(model)
    around = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(e is embeddings for e in m.modules())
    ]
    if not around:
        raise UsageError(f"virtual tokens need input embeddings, and {type(model).__name__} has none")
    return [around[-1]]


def input_width(model: Any) -> int:
    """Of the embeddings that the first stack's tokens have."""
    embeddings: Any = stacks(model)[0].get_input_embeddings()  # type: ignore[operator]
    return int(getattr(embeddings, "embedding_dim", 0) or text_config(model.config).hidden_size)


def named_arguments(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a stack is called with, by name."""
    kind: Any = type(stack)
    return dict(zip(_parameters(kind), args, strict=False)) | kwargs


def takes(stack: nn.Module, name: str) -> bool:
    kind: Any = type(stack)
    return name in _parameters(kind)


@functools.lru_cache(maxsize=64)
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def cached_length(arguments: dict[str, Any]) -> int:
    """Tokens whose keys and values are in the cache already."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_static_cache(arguments: dict[str, Any], what: str) -> None:
    """Raises UsageError for a cache whose size was fixed for the real tokens alone."""
    if getattr(arguments.get("past_key_values"), "is_compileable", False):
        raise UsageError(
            f"{what} puts tokens into the cache, for which a static one has no place; accepted: a dynamic cache"
        )


def length_and_device(arguments: dict[str, Any]) -> tuple[int, int, torch.device]:
    """(rows, tokens of this call, device)."""
    given = arguments.get("input_ids")
    given = arguments["inputs_embeds"] if given is None else given
    return given.shape[0], given.shape[1], given.device


def padding_mask(arguments: dict[str, Any], past: int, what: str) -> Tensor | None:
    """`attention_mask`, 1 for a token and 0 for padding, over the cached tokens and those of this call.

    Raises:
        UsageError: for a mask of another form, or of another length (a cache that holds other tokens than the mask).
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    length = past + length_and_device(arguments)[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UsageError(f"{what} takes an attention_mask of two dimensions (rows, tokens)")
    if mask.shape[1] != length:
        raise UsageError(
            f"attention_mask has {mask.shape[1]} tokens, but {past} are cached and {length - past} are given"
            " (virtual tokens are not counted); assisted generation and chunks of a cache are not supported with them"
        )
    return mask


def positions(stack: nn.Module, arguments: dict[str, Any], mask: Tensor | None, past: int) -> Tensor:
    """`(b or 1, t)` where the base puts the tokens of this call: given ones, else counted without the padding."""
    given = arguments.get("position_ids")
    if given is not None:
        if given.dim() != 2:
            raise UsageError(f"virtual tokens take position_ids of two dimensions, not {given.dim()}")
        return given
    first, ids = first_position(stack), arguments.get("input_ids")
    _, length, device = length_and_device(arguments)
    if first and ids is not None and past == 0:
        mask = ids != first - 1
    if mask is None:
        return torch.arange(past, past + length, device=device)[None] + first
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:] + first


def packed_edges(arguments: dict[str, Any]) -> list[list[int]] | None:
    """Where samples that share a row begin and end; None where each row is one sample."""
    given = arguments.get("position_ids")
    if given is None or arguments.get("attention_mask") is not None or cached_length(arguments):
        return None
    return segments(given, length_and_device(arguments)[0])


def check_length(model_config: Any, first: int, virtual: int, length: int) -> None:
    """Raises UsageError where virtual and real tokens are together more than the model's positions."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit and virtual + length > limit - first:
        raise UsageError(
            f"{virtual} virtual tokens and {length} of the input are more than the model's {limit - first} positions; "
            f"accepted: inputs of at most {max(0, limit - first - virtual)} tokens, or a smaller "
            "subspace.options.num_virtual_tokens"
        )


def at_input(stack: Any, change: Callable[[Tensor], Tensor | None]) -> None:
    """Let `change` have the embeddings of the stack's tokens (`(b, t, width)`), as its embedding module gives them."""
    stack.get_input_embeddings().register_forward_hook(functools.partial(_changed, change))


def _changed(
    change: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    return change(output)
