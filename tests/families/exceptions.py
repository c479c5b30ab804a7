"""What the general rule of `shrink` cannot know about a family, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Special:
    """Changes of the shrunk configuration, the length of the text, and names of layers that only some texts reach."""

    reason: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    length: int = 12
    sometimes: str = "expert"


_MAMBA_HEADS = "heads times head size is twice the width"
_REFORMER = {
    "axial_pos_shape": (4, 4),
    "axial_pos_embds_dim": (16, 32),
    "attn_layers": ["local", "lsh"],
    "num_buckets": 4,
}
_REFORMER |= {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "hash_seed": 0, "attention_head_size": 12}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 12, "indexer_budget": 8}

# By model type, or by task/model type where tasks differ.
EXCEPTIONS: dict[str, Special] = {
    "bamba": Special(_MAMBA_HEADS, {"mamba_n_heads": 8, "mamba_d_head": 12, "attn_layer_indices": [1]}),
    "cohere_compass_text": Special(
        "the default has no rotary parameters", {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
    ),
    "codegen": Special("rotates a part of a head", {"rotary_dim": 4}),
    "dbrx": Special(
        "the default attention has neither", {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}
    ),
    "dots3_note_text": Special(
        "a head has a rotated part and another", {"head_dim": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
    ),
    "dots1": Special("the default has no number of shared experts", {"n_shared_experts": 1}),
    "esm": Special("the default has no vocabulary", {"vocab_size": 101, "mask_token_id": 4}),
    "esmc": Special("has no groups of heads", {"num_key_value_heads": 4}),
    "falcon_h1": Special(_MAMBA_HEADS, {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_ssm": 96}),
    "gptj": Special("rotates a part of a head", {"rotary_dim": 4}),
    "granitemoehybrid": Special(
        _MAMBA_HEADS,
        {"mamba_n_heads": 8, "mamba_d_head": 12, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "hrm_text": Special("layers are run in cycles", {"num_hidden_layers": 16, "num_layers_per_stack": 2}),
    "jamba": Special(
        "kinds of layers by period",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "layoutlmv3": Special(
        "box sizes add up to the width; text alone", {"coordinate_size": 8, "shape_size": 8, "visual_embed": False}
    ),
    "led": Special("reached by tokens that the user marks as global", sometimes="_global"),
    "lfm2_moe": Special("the default has no kinds of layers", {"layer_types": ["conv", "full_attention"]}),
    "longformer": Special("reached by tokens that the user marks as global", sometimes="_global"),
    "mamba2": Special(_MAMBA_HEADS, {"num_heads": 8, "head_dim": 12, "n_groups": 1}),
    "markuplm": Special(
        "pads have ids of their own",
        {"max_xpath_tag_unit_embeddings": 220, "max_xpath_subs_unit_embeddings": 1004}
        | {"tag_pad_id": 216, "subs_pad_id": 1001},
    ),
    "mistral4": Special("the rotated part of a head has its own size", {"head_dim": 16}),
    "mobilebert": Special("bottlenecks", {"intra_bottleneck_size": 24, "true_hidden_size": 24, "embedding_size": 24}),
    "mpnet": Special("32 buckets are written in the code", {"relative_attention_num_buckets": 32}),
    "neomme": Special(
        "rotates a multiple of four",
        {
            "rope_parameters": {
                k: ROPE | {"partial_rotary_factor": 1 / 3} for k in ("full_attention", "sliding_attention")
            }
        },
    ),
    "nystromformer": Special(
        "landmarks divide the text", {"conv_kernel_size": 5, "segment_means_seq_len": 12, "num_landmarks": 4}
    ),
    "perceiver": Special("the decoder has as many positions as there may be", {"max_position_embeddings": 16}, 16),
    "qwen4_exp": Special(
        "the default has no indexer",
        {f"text_config.{k}": v for k, v in (_INDEXER | {"indexer_compress_ratio": 2}).items()},
    ),
    "qwen4_exp_text": Special("the default has no indexer", _INDEXER | {"indexer_compress_ratio": 2}),
    "recurrent_gemma": Special("kinds of layers by period", {"block_types": ["recurrent", "attention"]}),
    "reformer": Special("chunks divide the text", _REFORMER, 16),
    "causal-lm/reformer": Special("chunks divide the text", _REFORMER | {"is_decoder": True}, 16),
    "xlstm": Special("heads are rounded up to 16", {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0}),
    "xmod": Special("needs a language", {"default_language": "en_XX"}),
    "zamba": Special(
        "shared blocks need two users",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 24}
        | {"attention_hidden_size": 96, "num_key_value_heads": 4},
    ),
    "zamba2": Special(
        _MAMBA_HEADS,
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 24}
        | {"attention_hidden_size": 96, "num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_headdim": 12}
        | {"hybrid_layer_ids": [1, 3]},
        sometimes="adapter_list",  # a shared block holds one for each of its users, who are not the same block
    ),
}


def special(task: str, model_type: str) -> Special:
    return EXCEPTIONS.get(f"{task}/{model_type}") or EXCEPTIONS.get(model_type) or Special("")
