"""Parts of a model of several inputs that text never reaches: vision and audio towers, what joins them to the text, the
cross-attention of a decoder that stands alone, and layers for entities."""

from __future__ import annotations

from typing import Any

from torch import nn

# Modules by which a decoder reads another model's output, by the names that families use; and LUKE's layers for entities.
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")
ENTITIES = ("w2e_query", "e2w_query", "e2e_query")
TOWERS = ("vision_config", "audio_config")

UNREACHED = "text never reaches it; accepted for who trains with other inputs: subspace.target_modules with its name"


def unreached(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How the names of what text reaches begin (empty: all do), and how those of what it does not reach do.

    The language model is the module whose configuration is the one for text (`get_text_config`); a tower is one whose
    configuration is another part of the model's.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return (), _towers_of_stacks(model, config)
    alone = tuple(
        f"{name}." for name, _ in model.named_modules() if name.rpartition(".")[2] in (*CROSS_ATTENTION, *ENTITIES)
    )
    text = _text_config(config)
    if text is None:
        return (), alone
    parts = {type(part) for part in vars(config).values() if hasattr(part, "model_type")} - {type(text), type(config)}
    inside = [(f"{name}.", type(getattr(m, "config", None))) for name, m in model.named_modules() if name]
    towers = tuple(name for name, kind in inside if kind in parts)
    return () if text is config else tuple(name for name, kind in inside if kind is type(text)), (*towers, *alone)


def _towers_of_stacks(model: nn.Module, config: Any) -> tuple[str, ...]:
    """Of an encoder with eyes (T5Gemma 2): modules that have the configuration of a tower which is a part of a stack's."""
    stacks = [part for part in vars(config).values() if hasattr(part, "model_type")]
    kinds = {type(getattr(stack, name, None)) for stack in stacks for name in TOWERS} - {type(None)}
    return tuple(f"{name}." for name, m in model.named_modules() if type(getattr(m, "config", None)) in kinds)


def is_unreached(name: str, parts: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Whether a module of that name is one of them, for what `unreached` found."""
    reached, towers = parts
    return f"{name}.".startswith(towers) or (bool(reached) and not name.startswith(reached))


def _text_config(config: Any) -> Any:
    """The part of the configuration that is for text; None where there is no one such part."""
    if not hasattr(config, "get_text_config"):
        return None
    try:
        return config.get_text_config()
    except ValueError:  # several, as an encoder and a decoder have
        return None
