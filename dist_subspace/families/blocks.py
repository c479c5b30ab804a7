"""Stacks of transformer blocks: every family holds its blocks in an `nn.ModuleList`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The words for the two stacks of an encoder-decoder, in names of modules.
STACKS = ("encoder", "decoder")
# Stacks that run as one autograd function: reversible layers, which compute their inputs again from their outputs.
ONE_FUNCTION = ("ReformerEncoder",)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists that are not inside another, by name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: inner for name, inner in lists.items() if not any(name.startswith(other + ".") for other in lists)}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks: entries of its outermost module lists."""
    return [block for stack in block_lists(model).values() for block in stack]


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the names of what lies in lists of blocks begin."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def runs_as_one_function(model: nn.Module) -> bool:
    """Whether a stack of the model is one autograd function with a backward of its own."""
    return any(type(module).__name__ in ONE_FUNCTION for module in model.modules())


def shares_blocks(config: PretrainedConfig) -> bool:
    """Whether fewer blocks than layers are made, each used several times (ALBERT's `num_hidden_groups`)."""
    return 0 < getattr(config, "num_hidden_groups", 0) < config.num_hidden_layers


def stack_word(components: list[str]) -> str:
    """Of a name's components, the one that tells encoder from decoder; empty where a model has one stack."""
    return next((component for component in components if component in STACKS), "")
