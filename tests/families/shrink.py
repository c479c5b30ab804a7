"""A family's default configuration made small and odd: every field by what its name says, nested configurations alike.

Widths are divisible by neither 32 nor 64, the vocabulary is odd, keys and values have half the heads, and a list with an entry
a layer keeps one entry of every kind that it has.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

WIDTH, HEADS, HEAD_DIM, INNER, VOCABULARY = 48, 4, 12, 44, 101
LAYERS, EXPERTS, POSITIONS, WINDOW, OTHER = 2, 4, 64, 8, 16

# What a field's name says it holds: the first pattern that fits (whole names); values above the given one become it.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(token|codec|lang|pad|bos|eos|sep|cls|mask)_(id|ids|index)|mask_index|unk_index|.*_id", -1),
    (r"(.*_)?vocab_size(_.*)?|.*_vocab_size_base|encoder_hash_byte_group_vocab|num_hash_buckets", VOCABULARY),
    (
        r".*max_(source_|target_|encoder_|decoder_|2d_)?position(_embedding)?s(_.*)?|.*max_position_embeddings",
        POSITIONS,
    ),
    (r"n_positions|n_ctx|max_seq_len|model_max_length|context_length|position_embedding_size", POSITIONS),
    (r"(.*_)?(num_)?(key_value|kv)_heads|kv_n_heads|num_query_groups|indexer_kv_heads|n_mamba_heads", HEADS // 2),
    (r"linear_num_key_heads", HEADS // 2),
    (r"(.*_)?(num_|n_)?(attention_|self_attention_|cross_attention_|sliding_attention_)?heads|n_head", HEADS),
    (r"linear_num_(value_)?heads|index_n_heads|mamba_n_heads|mamba_num_heads|(.*_)?attention_heads", HEADS),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|hidden_)?layers|n_layer|n_layers|depth|num_blocks", LAYERS),
    (r"max_window_layers|num_layers_per_stack|num_self_attends_per_block|resampler_depth", LAYERS),
    (r"(.*_)?num_(local_)?experts|n_routed_experts|zero_expert_num|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace|(num|n)_shared_experts|num_dense_layers", 1),
    (r"num_mem_blocks|layer_group_size|n_groups|.*n_groups|num_kv_shared_layers", 1),
    (r"(.*_)?(sliding_window|window_size|chunk_size|block_size|attention_window|local_attention)", WINDOW),
    (r"qk_rope_head_dim", HEAD_DIM - 4),
    (r"qk_head_dim", 2 * HEAD_DIM - 4),
    (
        r"(.*_)?head_dim|.*_head_dim|d_head|d_kv|dim_head|attention_head_size|kv_channels|mamba_d_head|mamba_headdim",
        HEAD_DIM,
    ),
    (r"(.*_)?lora_rank|adapter_rank|laurel_rank|hc_lowrank|gated_norm_rank|(.*_)?time_step_rank|mamba_dt_rank", 8),
    (r"index_topk|index_topk_blocks", 8),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp)?|d_ff|dff|dim_ff|d_inner|hidden_dim|n_inner", INNER),
    (r"feed_forward_size|mlp_dim|moe_hidden_size", INNER),
    (r"(.*_)?(hidden_size|embed_dim|embedding_size|embedding_dim|emb_dim|hidden_dim)(_.*)?", WIDTH),
    (r"d_model|n_embd|dim|lru_width|word_embed_proj_dim|output_dim|d_latents|projection_dim", WIDTH),
    (r"(adapter_)?input_size|.*_(in|out)_dim", WIDTH),
    (r"(.*_)?(image_size|patch_size)", 0),
)
# What other families derive from the rest, where a family's default is None and its modules read it.
ABSENT = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS // 2,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NOT_FIELDS = ("transformers_version", "ignore_keys_at_rope_validation", "architectures", "id2label", "label2id")


def small(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """The same family's configuration with small sizes; `changes` (an exception's, a variant's) win. Dotted names go into
    nested configurations."""
    fields = _fields(config)
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            own = {key.removeprefix(f"{name}."): v for key, v in changes.items() if key.startswith(f"{name}.")}
            made[name] = small(value, own).to_dict()
        else:
            made[name] = ABSENT.get(name) if value is None else _value(name, value)
    made |= _layers(config, fields)
    made |= {"rope_parameters": _rope(fields["rope_parameters"])} if fields.get("rope_parameters") else {}
    if "qk_rope_head_dim" in fields:
        single = made.get("per_layer_config", {}).values()
        for own, size in ((made, HEAD_DIM - 4), *((own, 2 * HEAD_DIM - 4) for own in single)):
            own |= (
                {"num_key_value_heads": HEADS} if "num_key_value_heads" in own else {}
            )  # latent attention has no groups
            own |= {"head_dim": size} if "head_dim" in own else {}
    made |= {name: token for name, token in SPECIAL_TOKENS.items() if name in fields}
    made |= {"decoder_start_token_id": 1} if fields.get("is_encoder_decoder") else {}
    made |= {name: value for name, value in changes.items() if "." not in name}
    return type(config)(**made)


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """What the class takes, with the family's default values."""
    named = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in _NOT_FIELDS}
    return {k: copy.deepcopy(v) for k, v in named.items()}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float):
        return 0.0 if re.fullmatch(r".*(dropout|pdrop|layerdrop|drop_path|jitter).*", name) else value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size < 0:
                return value if value < VOCABULARY else VOCABULARY - 1 - sum(map(ord, name)) % 17
            return min(value, size) if size else min(value, 32)
    return value if value <= OTHER else OTHER


def _layers(config: PretrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The lists with one entry a layer and the settings of single layers, cut to the layers that show every kind; and how many
    these are."""
    count = next((n for n in ("num_hidden_layers", "num_layers", "n_layer") if isinstance(fields.get(n), int)), None)
    if count is None:
        return {}
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == fields[count] and v}
    lists = {k: v for k, v in lists.items() if isinstance(v[0], str | int | float)}
    spec = getattr(config, "_heterogeneity_spec", None)
    single = {} if spec is None else {int(k): v for k, v in spec.per_layer_overrides.items()}
    if not lists and not single:
        return {}
    rows = [(*(v[i] for v in lists.values()), str(single.get(i))) for i in range(fields[count])]
    chosen = sorted({rows.index(row) for row in rows})[:4]
    chosen = sorted([*chosen, *(i for i in range(len(rows)) if i not in chosen)][: max(LAYERS, len(chosen))])
    made = {count: len(chosen)} | {k: [_value(k, v[i]) for i in chosen] for k, v in lists.items()}
    if single:
        own = {new: single[old] for new, old in enumerate(chosen) if old in single}
        made["per_layer_config"] = {i: {k: _value(k, v) for k, v in values.items()} for i, values in own.items()}
    return made


def _rope(parameters: Any) -> Any:
    """Rotary parameters for a few positions."""
    if not isinstance(parameters, dict):
        return parameters
    made = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            made[name] = _rope(value)
        elif name == "original_max_position_embeddings":
            made[name] = POSITIONS // 2
        elif name == "partial_rotary_factor":
            made[name] = 0.5
        elif name == "mrope_section":
            made[name] = [1, 1, 1]
        elif name in ("short_factor", "long_factor"):
            made[name] = value[: HEAD_DIM // 2]
        else:
            made[name] = value
    return made
