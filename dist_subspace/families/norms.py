"""What families call norms, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dist_subspace.families.names import ends_with, last_component

# Attributes in which torch's own norms tell how many features they have: LayerNorm, GroupNorm, BatchNorm.
WIDTH_ATTRIBUTES = ("normalized_shape", "num_channels", "num_features")
# How the names of the norms of queries, keys and values begin, which are narrower than the model (`q_norm`, `kv_a_layernorm`).
NORMS_OF_PROJECTIONS = ("q_", "k_", "v_", "kv_", "query_", "key_", "value_")
# Post-norm encoders: ending of an FFN's output layer -> the norm that takes the sum of that output and its residual.
POST_NORMS: Mapping[str, str] = {
    "output.dense": "output.LayerNorm",  # BERT and its descendants
    "ffn.lin2": "output_layer_norm",  # DistilBERT
    "ffn_output": "full_layer_layer_norm",  # ALBERT
}


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm with a weight: LayerNorm, RMSNorm, and the classes that models define themselves, all of which have
    `norm` in the class's name."""
    parameters = dict(module.named_parameters(recurse=False))
    named_so = "norm" in type(module).__name__.lower()
    return named_so and parameters.get("weight") is not None and not any(module.children())


def stated_width(norm: nn.Module) -> int | None:
    """How many features a norm says that it has; None for classes that say nothing (LlamaRMSNorm)."""
    for attribute in WIDTH_ATTRIBUTES:
        shape = getattr(norm, attribute, None)
        if shape is not None:
            return int(shape if isinstance(shape, int) else shape[-1])
    return None


def is_norm_of_projection(name: str) -> bool:
    """Whether a norm of that name acts on queries, keys or values alone."""
    return last_component(name).startswith(NORMS_OF_PROJECTIONS)


def post_norm(model: nn.Module, ffn_output: str) -> str | None:
    """The name of the norm after an FFN's residual sum, where the model is a post-norm encoder that is known by its names."""
    for ending, norm in POST_NORMS.items():
        if ends_with(ffn_output, ending):
            name = ffn_output.removesuffix(ending) + norm
            return name if name in dict(model.named_modules()) else None
    return None
