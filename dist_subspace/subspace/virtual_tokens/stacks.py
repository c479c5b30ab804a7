"""A model's stacks of blocks (one; encoder and decoder), what their `forward` is given, and the positions of its tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import config_of, is_encoder_decoder, text_config
from dist_subspace.families.embeddings import input_embeddings
from dist_subspace.families.positions import first_position
from dist_subspace.subspace.virtual_tokens.segments import segments

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Arguments = dict[str, Any]
"""What a stack's `forward` is given, by name."""


def stacks(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers modules that turn tokens into hidden states: encoder and decoder, or the innermost one that has the
    embeddings (a head may call that one without the base model around it).

    Raises:
        UsageError: for a module that is no transformers model, and for one without input embeddings.
    """
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


def input_width(model: nn.Module) -> int:
    """The width of the embeddings that the first stack's tokens have."""
    first = stacks(model)[0]
    return int(getattr(first.get_input_embeddings(), "embedding_dim", 0) or text_config(config_of(model)).hidden_size)


def named_arguments(stack: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Arguments:
    """What a stack is called with, by name."""
    return dict(zip(_parameters(type(stack).forward), args, strict=False)) | kwargs


def takes(stack: nn.Module, name: str) -> bool:
    """Whether the stack's `forward` has an argument of that name."""
    return name in _parameters(type(stack).forward)


@functools.lru_cache(maxsize=64)
def _parameters(forward: Callable[..., object]) -> tuple[str, ...]:
    """The names of a method's arguments, `self` apart."""
    return tuple(inspect.signature(forward).parameters)[1:]


def cached_length(arguments: Arguments) -> int:
    """How many tokens have their keys and values in the cache already."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_static_cache(arguments: Arguments, what: str) -> None:
    """Refuse (UsageError) a cache whose size was fixed for the real tokens alone."""
    if getattr(arguments.get("past_key_values"), "is_compileable", False):
        raise UsageError(
            f"{what} puts tokens into the cache, for which a static one has no place; accepted: a dynamic cache"
        )


def length_and_device(arguments: Arguments) -> tuple[int, int, torch.device]:
    """(rows, tokens of this call, device)."""
    inputs = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if inputs is None else inputs
    return inputs.shape[0], inputs.shape[1], inputs.device


def padding_mask(arguments: Arguments, past: int, what: str) -> Tensor | None:
    """The `attention_mask`, 1 for a token and 0 for padding, over the cached tokens and those of this call; None where none is
    given.

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


def positions(stack: nn.Module, arguments: Arguments, mask: Tensor | None, past: int) -> Tensor:
    """The positions `(b or 1, t)` that the base gives the tokens of this call: given ones, else counted without the padding.

    Raises:
        UsageError: for given positions of other than two dimensions.
    """
    given: Tensor | None = arguments.get("position_ids")
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


def packed_edges(arguments: Arguments) -> list[list[int]] | None:
    """The edges of the samples that share a row; None where each row is one sample."""
    given = arguments.get("position_ids")
    if given is None or arguments.get("attention_mask") is not None or cached_length(arguments):
        return None
    return segments(given, length_and_device(arguments)[0])


def check_length(model_config: PretrainedConfig, first: int, virtual: int, length: int) -> None:
    """Refuse (UsageError) virtual and real tokens that are together more than the model's positions."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit and virtual + length > limit - first:
        raise UsageError(
            f"{virtual} virtual tokens and {length} of the input are more than the model's {limit - first} positions; "
            f"accepted: inputs of at most {max(0, limit - first - virtual)} tokens, or a smaller "
            "subspace.options.num_virtual_tokens"
        )


def at_input(stack: nn.Module, change: Callable[[Tensor], Tensor | None]) -> None:
    """Let `change` have the embeddings of the stack's tokens (`(b, t, width)`), as its embedding module gives them."""
    embeddings = input_embeddings(stack)
    assert embeddings is not None  # `stacks` refuses a model without
    embeddings.register_forward_hook(functools.partial(_changed, change))


def _changed(
    change: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple[object, ...], output: Tensor
) -> Tensor | None:
    return change(output)
