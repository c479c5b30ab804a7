"""Entries of a model's configuration that families call differently, or nest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Entries that give a family's linear layers a bias; the first four are the usual ones.
BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "bias")
# Entries that name layers beyond the last, for the prediction of several tokens: DeepSeek, Qwen.
EXTRA_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def config_of(model: nn.Module) -> PretrainedConfig:
    """The configuration that a transformers model holds."""
    return model.config  # type: ignore[return-value]


def text_part(config: PretrainedConfig | None) -> PretrainedConfig | None:
    """The one part of a configuration that speaks of text, or the whole where it has no parts; None where several do, as those of
    an encoder and a decoder, or where the configuration is not of transformers."""
    if config is None or not hasattr(config, "get_text_config"):
        return None
    try:
        return config.get_text_config()
    except ValueError:
        return None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that speaks of text; the whole where that is not one part."""
    part = text_part(config)
    return config if part is None else part


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, by its own configuration."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def extra_layers(config: PretrainedConfig) -> int:
    """How many layers behind the last one a checkpoint of this configuration may hold, which the class leaves out."""
    text = text_config(config)
    return max(int(getattr(text, entry, 0) or 0) for entry in EXTRA_LAYERS)


def stated_positions(config: PretrainedConfig) -> int | None:
    """Most tokens of a row by the configuration alone; of rotary positions, with what a scaling stretches them to. None where it
    says nothing."""
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    longest = positions
    for part in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(part, dict) and isinstance(part.get("factor"), int | float):
            longest = max(longest, int(part["factor"] * (part.get("original_max_position_embeddings") or positions)))
    return longest
