"""What families call the linear layers of an attention and of a feed-forward network (FFN).

Each table maps an ending of a name to the families that use it. A word that is too short to be safe alone stands with the
module around it (`SelfAttention.k`).
"""

from __future__ import annotations

from collections.abc import Mapping

from dist_subspace.families.experts import is_inside_router
from dist_subspace.families.names import ends_with_any

# The projections that make keys and values. One matrix for queries, keys and values counts as key and value.
KEYS_AND_VALUES: Mapping[str, str] = {
    "k_proj": "LLaMA and most decoders since; OPT, BART, GPT-Neo",
    "v_proj": "the same",
    "key": "BERT and its descendants, Reformer, Perceiver",
    "value": "the same",
    "k_lin": "DistilBERT, XLM, FlauBERT",
    "v_lin": "the same",
    "key_proj": "DeBERTa-v2, ProphetNet",
    "value_proj": "the same",
    "SelfAttention.k": "T5 and its descendants",
    "SelfAttention.v": "the same",
    "EncDecAttention.k": "T5's decoder",
    "EncDecAttention.v": "the same",
    "LocalSelfAttention.k": "LongT5's encoder",
    "LocalSelfAttention.v": "the same",
    "TransientGlobalSelfAttention.k": "LongT5's encoder with transient-global attention",
    "TransientGlobalSelfAttention.v": "the same",
    "attn.c_attn": "GPT-2 and its kin: queries, keys and values in one",
    "crossattention.c_attn": "GPT-2's cross-attention: keys and values in one",
    "query_key_value": "GPT-NeoX, BLOOM, Falcon, Persimmon: all three in one",
    "qkv_proj": "Phi-3, CodeGen, MiniMax: all three in one",
    "Wqkv": "MPT, DBRX, ModernBERT: all three in one",
    "attn.k": "MPNet",
    "attn.v": "MPNet",
    "self.in_proj": "DeBERTa: all three in one",
    "key_global": "Longformer and LED, for tokens that the user marks as global",
    "value_global": "the same",
    "k_head": "Funnel",
    "v_head": "Funnel",
    "k_proj.linear": "Moshi",
    "v_proj.linear": "Moshi",
    "v_proj_current": "Zaya, whose values come half from the token and half from the one before",
    "v_proj_delayed": "the same",
    "Wk": "CTRL",
    "Wv": "CTRL",
    "project_k": "CPM-Ant",
    "project_v": "CPM-Ant",
    "kv_b_proj": "DeepSeek-V2, V3 and others with latent attention: what widens the latent to keys and values",
    "self_attn.kv_proj": "DeepSeek-V4: keys and values in one",
    "self_attention.kv_proj": "JetMoe: keys and values in one",
    "query_key": "Reformer's shared queries and keys",
}

# What widens the input of an FFN. A gate is never one of them: to scale before the activation is another function.
FFN_INPUTS: Mapping[str, str] = {
    "up_proj": "LLaMA and most decoders since, MPT",
    "intermediate.dense": "BERT and its descendants",
    "fc1": "OPT, BART, Phi",
    "c_fc": "GPT-2 and its kin, GPT-Neo, StarCoder2",
    "lin1": "DistilBERT, XLM, FlauBERT",
    "dense_h_to_4h": "GPT-NeoX, BLOOM, Falcon, Persimmon",
    "wi": "T5, LongT5, Switch Transformers",
    "wi_1": "mT5, UMT5: of the two, wi_0 is the gate",
    "up": "families that transformers loads by their own code",
    "fc_in": "GPT-J, CodeGen",
    "ffn": "ALBERT",
    "ffn.0": "CTRL",
    "w_in.w_1": "CPM-Ant: of the two, w_0 is the gate",
    "feed_forward.w3": "LFM2: of the two, w1 is the gate",
    "ff.layer_1": "XLNet",
    "mlp.dense1": "Perceiver",
    "ffn.linear_1": "Funnel",
    "feed_forward.intermediate": "ProphetNet",
    "feed_forward.dense.dense": "Reformer",
}

# The targets of the scalings (docs/methods.md, "Targets").
KEY_VALUE_UP: tuple[str, ...] = (*KEYS_AND_VALUES, *FFN_INPUTS)

# What widens the input of a family that has neither an attention nor an FFN (Mamba).
BLOCK_INPUTS: tuple[str, ...] = ("in_proj",)

# Gate and FFN input in one matrix: half of it is a gate.
FUSED_GATES: Mapping[str, str] = {
    "gate_up_proj": "Phi-3, GLM, Zamba2",
    "mlp.Wi": "ModernBERT",
    "shared_mlp.input_linear": "GraniteMoeHybrid",
}

# The last linear layer of an attention.
ATTENTION_OUTPUTS: Mapping[str, str] = {
    "o_proj": "LLaMA and most decoders since",
    "out_proj": "OPT, BART, GPT-Neo, GPT-J, CodeGen, MPT, LFM2",
    "attention.output.dense": "BERT and its descendants, Reformer, Perceiver",
    "attn.c_proj": "GPT-2 and its kin",
    "crossattention.c_proj": "GPT-2's cross-attention",
    "attention.dense": "GPT-NeoX, ALBERT",
    "self_attention.dense": "BLOOM, Falcon",
    "self_attn.dense": "Phi, Persimmon",
    "out_lin": "DistilBERT, XLM, FlauBERT",
    "attn.Wo": "ModernBERT",
    "attention.wo": "families that transformers loads by their own code",
    "attn.proj": "the same",
    "SelfAttention.o": "T5 and its descendants",
    "EncDecAttention.o": "T5's decoder",
    "LocalSelfAttention.o": "LongT5's encoder",
    "TransientGlobalSelfAttention.o": "LongT5's encoder with transient-global attention",
}

# Layers before an attention whose names end as those of an attention's output do.
NOT_ATTENTION_OUTPUTS: Mapping[str, str] = {
    "bottleneck.attention.dense": "MobileBERT, whose bottleneck narrows what the attention reads",
}

# The last linear layer of an FFN. A name that ends like an attention's output too is the attention's.
FFN_OUTPUTS: Mapping[str, str] = {
    "down_proj": "LLaMA and most decoders since, MPT",
    "output.dense": "BERT and its descendants, Reformer",
    "mlp.c_proj": "GPT-2 and its kin, GPT-Neo, StarCoder2",
    "fc2": "OPT, BART, Phi",
    "dense_4h_to_h": "GPT-NeoX, BLOOM, Falcon, Persimmon",
    "wo": "T5 and its descendants",
    "lin2": "DistilBERT, XLM, FlauBERT",
    "fc_out": "GPT-J, CodeGen",
    "ffn_output": "ALBERT",
    "mlp.Wo": "ModernBERT",
    "w2": "LFM2",
    "mlp.proj": "families that transformers loads by their own code",
    "down": "the same",
}


def is_attention_output(name: str) -> bool:
    """Whether a linear layer of that name is the last one of an attention."""
    return (
        ends_with_any(name, ATTENTION_OUTPUTS)
        and not ends_with_any(name, NOT_ATTENTION_OUTPUTS)
        and not is_inside_router(name)
    )


def is_ffn_output(name: str) -> bool:
    """Whether a linear layer of that name is the last one of an FFN."""
    attention = ends_with_any(name, ATTENTION_OUTPUTS)
    return ends_with_any(name, FFN_OUTPUTS) and not attention and not is_inside_router(name)


def holds_gate(name: str) -> bool:
    """Whether a linear layer of that name is gate and FFN input in one."""
    return ends_with_any(name, FUSED_GATES)
