"""The only file that touches transformers below its public surface.

Read against transformers 5.23.0 (`modeling_utils.py`, `initialization.py`, `conversion_mapping.py`);
tests/loading/test_transformers_internals.py fails when what is used here moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
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


def renamed_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The name that transformers gives to each key of a checkpoint -> the key (`get_model_conversion_mapping`).

    Families whose modules were renamed keep the old names in files: GPT-NeoX's `embed_out` is `lm_head`, a norm's `gamma` is
    its `weight`. Transforms that split or join tensors are not renamings, and are left out.
    """
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]  # type: ignore[arg-type]
    names = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        names[name] = key
    return names


def written_keys(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The key under which transformers itself would save each parameter of the model: `renamed_keys` the other way round
    (`reverse_transform`). Prefixes are left as the model has them, and tensors that it would split or join too."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming) and not isinstance(t, PrefixChange)]
    backwards = [renaming.reverse_transform() for renaming in reversed(renamings)]
    keys = {}
    for name in names:
        key = name
        for renaming in backwards:
            key = renaming.rename_source_key(key)[0]
        keys[name] = key
    return keys


def expected_parameters(model: nn.Module, config: PretrainedConfig) -> dict[str, nn.Parameter]:
    """The parameters that the model's class has with this configuration, by every name (tied ones are one object); they have
    a shape and no values."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        other = type(model)(config)
    other.tie_weights()  # type: ignore[operator]
    return dict(other.named_parameters(remove_duplicate=False))


def empty_model(model_class: Any, config: PretrainedConfig) -> nn.Module:
    """A model of a class whose parameters have a shape and no values."""
    with no_init_weights(), init_empty_weights():
        model: nn.Module = model_class(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def base_prefix(model: nn.Module) -> str:
    """The name under which a model with a head holds its body (`base_model_prefix`)."""
    return getattr(model, "base_model_prefix", "") or ""
