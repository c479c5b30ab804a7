"""What attention modules say of themselves, in every family."""

from __future__ import annotations

import pytest
from torch import nn

from dist_subspace.families.attention import is_causal, is_cross_attention
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_are_causal_and_encoders_are_not(family: str) -> None:
    assert is_causal(tiny_model(family)) == ("CausalLM" in family or "LMHead" in family or "T5" in family)


@pytest.mark.parametrize(
    "name", ["layers.0.encoder_attn", "block.1.layer.1.EncDecAttention", "h.0.crossattention.self"]
)
def test_cross_attention_is_known_by_its_name(name: str) -> None:
    assert is_cross_attention(name, nn.Identity())
    assert not is_cross_attention("layers.0.self_attn", nn.Identity())
