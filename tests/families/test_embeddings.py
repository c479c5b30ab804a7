"""A model's table of input tokens is found where there is one, and its absence stops nothing that does not need it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.families.embeddings import input_embeddings
from tests.tiny_models import tiny_config, tiny_model


def canine() -> nn.Module:
    torch.manual_seed(0)
    hashes = {"num_hash_buckets": 32, "num_hash_functions": 4, "local_transformer_stride": 4, "downsampling_rate": 2}
    config = tiny_config("CanineConfig", num_hidden_layers=1, **hashes, upsampling_kernel_size=2)
    return transformers.CanineForSequenceClassification(config).eval()


def perceiver() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_latents": 8, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16}
    config = tiny_config("PerceiverConfig", **sizes, **heads, max_position_embeddings=16)
    return transformers.PerceiverForMaskedLM(config).eval()


def reformer() -> nn.Module:
    torch.manual_seed(0)
    positions = {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (8, 8), "max_position_embeddings": 16}
    chunks = {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "attention_head_size": 8}
    sizes = {"hidden_size": 16, "feed_forward_size": 20, "num_attention_heads": 2}
    hashes = {"hash_seed": 0, "num_hashes": 1, "num_buckets": 2}
    config = tiny_config("ReformerConfig", **positions, **chunks, **sizes, **hashes)
    return transformers.ReformerForMaskedLM(config)


def test_a_table_is_found() -> None:
    model = tiny_model()
    assert input_embeddings(model) is model.model.embed_tokens


@pytest.mark.parametrize("make", [canine, perceiver])
def test_a_model_without_a_table_is_adapted(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    assert input_embeddings(model) is None
    ids = torch.randint(3, 40, (2, 16))
    before = model(input_ids=ids).logits
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2))
    after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before)
    after.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in dsub.trainable_parameters(model))


def test_new_tokens_are_refused_where_there_is_no_table() -> None:
    config = dsub.SubspaceConfig(method="lora", rank=2, new_tokens=[3])
    with pytest.raises(
        UsageError, match="new tokens need an embedding table, and CanineForSequenceClassification has none"
    ):
        dsub.attach(canine(), config)


def test_reversible_blocks_pass_gradients_on_over_frozen_embeddings() -> None:
    model = dsub.attach(reformer(), dsub.SubspaceConfig(method="lora", rank=2)).train()
    model(input_ids=torch.randint(3, 40, (2, 16))).logits.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert all(g.any() for n, g in gradients.items() if n.endswith("lora_B"))
