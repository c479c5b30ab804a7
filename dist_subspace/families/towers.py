"""Parts of a model of several inputs that text never reaches: vision and audio towers, what joins them to the text, the
cross-attention of a decoder that stands alone, and layers for entities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dist_subspace.families.attention import CROSS_ATTENTION
from dist_subspace.families.configuration import config_of, is_encoder_decoder, text_part
from dist_subspace.families.names import last_component

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# LUKE's layers for entities.
ENTITIES = ("w2e_query", "e2w_query", "e2e_query")
# The entries of a configuration that hold a tower's own.
TOWERS = ("vision_config", "audio_config")


def unreached(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How the names of what text reaches begin (empty: all do), and how those of what it does not reach do.

    The language model is the module whose configuration is the one for text (`get_text_config`); a tower is one whose
    configuration is another part of the model's.
    """
    if is_encoder_decoder(model):
        return (), _towers_of_stacks(model, config_of(model))
    alone = tuple(
        f"{name}." for name, _ in model.named_modules() if last_component(name) in (*CROSS_ATTENTION, *ENTITIES)
    )
    config: PretrainedConfig | None = getattr(model, "config", None)
    text = text_part(config)
    if config is None or text is None:
        return (), alone
    parts = {type(part) for part in _parts(config)} - {type(text), type(config)}
    inside = [(f"{name}.", type(getattr(m, "config", None))) for name, m in model.named_modules() if name]
    towers = tuple(name for name, kind in inside if kind in parts)
    return () if text is config else tuple(name for name, kind in inside if kind is type(text)), (*towers, *alone)


def is_unreached(name: str, parts: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Whether a module of that name is one of them, for what `unreached` gave."""
    reached, towers = parts
    return f"{name}.".startswith(towers) or (bool(reached) and not name.startswith(reached))


def _towers_of_stacks(model: nn.Module, config: PretrainedConfig) -> tuple[str, ...]:
    """Of an encoder with eyes (T5Gemma 2): modules that have the configuration of a tower which is a part of a stack's."""
    kinds = {type(getattr(stack, name, None)) for stack in _parts(config) for name in TOWERS} - {type(None)}
    return tuple(f"{name}." for name, m in model.named_modules() if type(getattr(m, "config", None)) in kinds)


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configurations inside a configuration."""
    return [part for part in vars(config).values() if hasattr(part, "model_type")]
