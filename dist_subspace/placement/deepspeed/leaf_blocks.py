"""Decoder blocks that ZeRO-3 gathers at once.

Read against deepspeed 0.19.8 (`utils/z3_leaf_module.py`, `runtime/zero/parameter_offload.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.families.blocks import block_lists, blocks
from dist_subspace.families.experts import callers_of_experts
from dist_subspace.placement.deepspeed.reuse import called_once
from dist_subspace.placement.deepspeed.shards import full_shape, is_partitioned


def mark_leaf_blocks(model: nn.Module) -> list[str]:
    """Let ZeRO-3 gather a decoder block at once (`_z3_leaf`): half the gathers under activation checkpointing.

    Blocks are the entries of the model's `nn.ModuleList`s that are not inside another; those that a forward does not call
    exactly once are no leaves. What calls the entries of a list of experts always is one: ranks whose tokens go to different
    experts would gather different ones, and wait for each other forever. Returns the class names of the blocks that are leaves.
    `set_z3_leaf_module` does no more, and would import DeepSpeed, which may come later or not at all.
    """
    leaves = [block for name, stack in block_lists(model).items() if called_once(model, name) for block in stack]
    for block in (*leaves, *callers_of_experts(model)):
        if not hasattr(block, _INPUT_HOOK):
            hook = block.register_forward_pre_hook(_ask_for_input_gradients, with_kwargs=True, prepend=True)
            setattr(block, _INPUT_HOOK, hook)
        block._z3_leaf = True  # type: ignore[assignment]
    return sorted({type(block).__name__ for block in leaves})


_INPUT_HOOK = "_dist_subspace_input_hook"


def _ask_for_input_gradients(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """DeepSpeed reduces a leaf module's gradients in a full backward hook, which fires when the gradient of the module's
    input is there. Behind frozen embeddings the first block's input asks for none: the hook then fires before the adapter
    has its gradients, and zeros are reduced in their place."""
    if not (block.training and torch.is_grad_enabled() and any(is_partitioned(p) for p in block.parameters())):
        return
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if inputs and not any(x.requires_grad for x in inputs):
        inputs[0].requires_grad_(True)


def unmark_leaf_blocks(model: nn.Module) -> None:
    for block in blocks(model):
        block._z3_leaf = False  # type: ignore[assignment]


def largest_block_numel(model: nn.Module) -> int:
    """Stored frozen elements (packed bytes count as one each) of the largest block: what the gather limits are sized by.
    Trained parameters stay whole between steps, and are not gathered with it."""
    frozen = [[_numel(p) for p in block.parameters() if not p.requires_grad] for block in blocks(model)]
    return max((sum(numels) for numels in frozen), default=0)


def _numel(parameter: Tensor) -> int:
    return math.prod(full_shape(parameter)) if is_partitioned(parameter) else parameter.numel()
