"""Depth and kind of a layer, from its name."""

from __future__ import annotations

from dist_subspace.report.places import OUTSIDE, Place, places


def test_a_kind_is_the_shortest_ending_that_tells_kinds_apart() -> None:
    llama = ["model.layers.3.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
    assert list(places(llama).values()) == [Place(3, "q_proj"), Place(11, "down_proj")]
    gpt2 = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.attn.c_attn"]
    assert [p.kind for p in places(gpt2).values()] == ["attn.c_proj", "mlp.c_proj", "c_attn"]
    bert = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.attention.output.dense"]
    assert [p.kind for p in places(bert).values()] == ["output.dense", "attention.output.dense"]


def test_encoder_and_decoder_are_kept_apart_where_there_are_both() -> None:
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.q"]
    assert list(places(names).values()) == [
        Place(0, "encoder SelfAttention.q"),
        Place(1, "decoder EncDecAttention.q"),
    ]
    assert places(names[:1])[names[0]] == Place(0, "q")


def test_what_lies_in_no_block_is_outside() -> None:
    names = ["transformer.ln_f", "transformer.h.2.ln_1", "prompt_tokens"]
    assert list(places(names).values()) == [Place(OUTSIDE, "ln_f"), Place(2, "ln_1"), Place(OUTSIDE, "prompt_tokens")]


def test_experts_of_a_block_are_of_one_kind() -> None:
    names = [f"model.layers.4.mlp.experts.{i}.up_proj" for i in range(3)]
    assert set(places(names).values()) == {Place(4, "up_proj")}
