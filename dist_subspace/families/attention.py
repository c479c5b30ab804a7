"""What families call attention modules, and what these say of their heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dist_subspace.families.configuration import config_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Modules by which a decoder reads another model's output: BART, LLaMA's vision models, GPT-2, T5.
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")
# Attributes in which an attention module holds the width of a head: LLaMA, BERT, T5, GPT-NeoX.
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module of that name in a stack attends to another stack's output: as it says, or by its name."""
    words = tuple(word.lower() for word in CROSS_ATTENTION)
    return bool(getattr(module, "is_cross_attention", False)) or any(
        "cross" in component or component in words for component in name.lower().split(".")
    )


def is_causal(model: nn.Module) -> bool:
    """Whether the model's tokens see only what stands before them, as its attention modules say."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def has_latent_keys(config: PretrainedConfig) -> bool:
    """Whether keys and values are made from one narrow latent (DeepSeek's multi-head latent attention)."""
    return bool(getattr(config, "kv_lora_rank", None))


def key_value_heads(module: nn.Module) -> tuple[int, int]:
    """(heads, width of a head) of an attention module's keys and values."""
    config = config_of(module)
    width = next((w for name in HEAD_WIDTHS if isinstance(w := getattr(module, name, None), int)), None)
    groups = getattr(module, "num_key_value_groups", None)
    heads = config.num_attention_heads // groups if groups else getattr(config, "num_key_value_heads", None)
    return heads or config.num_attention_heads, width or config.hidden_size // config.num_attention_heads
