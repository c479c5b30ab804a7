"""The only file that touches transformers below its public surface.

Read against transformers 5.23.0 (`modeling_utils.py`, `initialization.py`); tests/loading/test_transformers_internals.py
fails when what is used here moves.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights


def build_skeleton(auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """The model with every parameter on the meta device and every buffer real (a rotary embedding computes its buffers when
    it is made, and they are in no checkpoint)."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype, **kwargs)
    model.tie_weights()  # the empty parameters are new objects: tie those
    return model


def initialise(model: nn.Module, module: nn.Module, seed: int) -> None:
    """Give a module that the checkpoint lacks (a new classification head) the model family's own initial values, equal on
    every rank (`_init_weights`, `_is_hf_initialized`)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        model._init_weights(module)  # type: ignore[operator]


def forget_quantization(model: nn.Module) -> None:
    """Take away the marks at which transformers' Trainer refuses to train a quantised model: its layers are plain frozen
    operators now."""
    for mark in ("is_quantized", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config


def base_prefix(model: nn.Module) -> str:
    """The name under which a model with a head holds its body (`base_model_prefix`)."""
    return getattr(model, "base_model_prefix", "") or ""
