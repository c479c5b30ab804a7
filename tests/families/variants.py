"""What else a family's configuration may say: rotary types, ties, biases, heads, and blocks of another form."""

from __future__ import annotations

from typing import Any


def _named(task: str, *model_types: str) -> tuple[tuple[str, str], ...]:
    return tuple((task, model_type) for model_type in model_types)


_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
_ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear"} | _ROPE,
    "dynamic": {"rope_type": "dynamic"} | _ROPE,
    "yarn": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0} | _ROPE,
    "longrope": {"rope_type": "longrope", "short_factor": _FACTORS, "long_factor": _FACTORS[::-1]} | _ROPE,
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _ROPE,
}
_ROTATED = ("llama", "qwen2", "mistral", "qwen3", "gemma", "olmo2", "starcoder2", "phi")
_TIED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "opt",
    "gpt_neox",
    "olmo",
    "phi",
    "cohere",
    "stablelm",
    "granite",
)
_TWO_STACKS = ("t5", "mt5", "umt5", "longt5", "bart", "switch_transformers")
_BIASED = ("llama", "qwen3", "olmo", "granite", "helium", "glm4", "apertus", "seed_oss")

# What is changed, of which families.
VARIANTS: tuple[tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...]], ...] = (
    *((name, (("rope_parameters", rope),), _named("causal-lm", *_ROTATED)) for name, rope in _ROTARY.items()),
    ("tied", (("tie_word_embeddings", True),), _named("causal-lm", *_TIED)),
    ("untied", (("tie_word_embeddings", False),), _named("causal-lm", *_TIED, "gpt2", "bloom")),
    ("untied", (("tie_word_embeddings", False),), _named("masked-lm", "bert", "roberta")),
    ("untied", (("tie_word_embeddings", False),), _named("seq2seq-lm", *_TWO_STACKS)),
    ("bias", (("attention_bias", True), ("mlp_bias", True)), _named("causal-lm", *_BIASED)),
    ("clip", (("clip_qkv", 0.5),), _named("causal-lm", "olmo", "olmoe")),
    (
        "one-head",
        (("num_key_value_heads", 1),),
        _named("causal-lm", "llama", "qwen2", "mistral", "starcoder2", "gemma"),
    ),
    ("gated", (("feed_forward_proj", "gated-gelu"),), _named("seq2seq-lm", "t5", "longt5")),
    (
        "old-decoder",
        (("new_decoder_architecture", False), ("multi_query", False), ("num_kv_heads", 4)),
        _named("causal-lm", "falcon"),
    ),
    ("new-decoder", (("new_decoder_architecture", True),), _named("causal-lm", "falcon")),
    ("sequential", (("use_parallel_residual", False),), _named("causal-lm", "gpt_neox")),
    ("multi-query", (("multi_query", False),), _named("causal-lm", "gpt_bigcode")),
    ("post-norm", (("do_layer_norm_before", False), ("word_embed_proj_dim", 20)), _named("causal-lm", "opt")),
)
