"""The tables in which transformers' models look their functions up: attention by name, and the loss.

Read against transformers 5.23.0 (`modeling_utils.py`, `integrations/`, `loss/loss_utils.py`, and how the files of its families
call them); tests/test_transformers_tables.py fails when what is used here moves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ATTENTION_TABLE, EAGER_ATTENTION = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
Attention = Callable[..., tuple[Tensor, Tensor | None]]


class OtherAttention:
    """A configuration that names another attention function, and is the model's own in everything else.

    Arguments:
        config: the model's own configuration, which is asked for all the rest, each time.
        name: under which the function is registered in transformers' `AttentionInterface`.
    """

    def __init__(self, config: Any, name: str) -> None:
        self.config, self._attn_implementation = config, name

    def __getattr__(self, name: str) -> Any:
        if name == "config" or name.startswith("__"):  # while a copy is being made, there is none yet
            raise AttributeError(name)
        return getattr(self.config, name)


def attention_name(config: Any) -> str | None:
    """The attention implementation that a configuration names (`sdpa`, `eager`, ...); None where it names none."""
    return getattr(config, "_attn_implementation", None)


def calls_attention_by_name(module: nn.Module) -> bool:
    """Whether the module takes its attention from transformers' table of functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and ATTENTION_TABLE in code.co_names and hasattr(module, "config")


def attention_function(module: nn.Module, config: Any) -> Attention:
    """The function by which the module would attend with this configuration: the table's, or the eager one of its own file."""
    names = inspect.unwrap(type(module).forward).__globals__
    attention: Attention = names[ATTENTION_TABLE].get_interface(attention_name(config), names.get(EAGER_ATTENTION))
    return attention


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss leaves out each row's first label, by the Trainer's own rule when it counts targets."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
