"""Tables and counters that a model computes itself; an older version of its family saved some of them."""

from __future__ import annotations

import re

from torch import nn

# The table of a rotary embedding's frequencies.
FREQUENCIES = "inv_freq"
COMPUTED = re.compile(
    r"^(masked_bias|causal_mask|bias_mask|position_ids|token_type_ids|inv_freq|original_inv_freq|cos_cached|sin_cached|"
    r"freqs_cis|num_batches_tracked|_extra_state|_float_tensor|version|attn_mask|embed_positions|slope_rate)$"
)


def is_computed(component: str) -> bool:
    """Whether a component of a tensor's name says that the model computes the tensor."""
    return COMPUTED.match(component) is not None


def has_rotary_table(model: nn.Module) -> bool:
    return any(name.endswith(FREQUENCIES) for name, _ in model.named_buffers())
