"""The models that the recipes name, as their config.json on the Hub describes them, and how many weights they have."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, RobertaConfig

_LLAMA_3 = {
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
}
_QWEN_3 = {"vocab_size": 151_936, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960, "head_dim": 128}
_QWEN_3_MOE = {
    **_QWEN_3,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "norm_topk_prob": True,
}

SHAPES: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
        **_LLAMA_3,
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        **_LLAMA_3, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        **_LLAMA_3, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
    ),
    "meta-llama/Llama-3.1-405B-Instruct": LlamaConfig(
        **_LLAMA_3, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        **_QWEN_3,
        **{"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
        num_key_value_heads=8,
    ),
    "Qwen/Qwen3-32B": Qwen3Config(
        **_QWEN_3,
        **{"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64},
        num_key_value_heads=8,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        **_QWEN_3_MOE,
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32},
        moe_intermediate_size=768,
    ),
    "Qwen/Qwen3-235B-A22B": Qwen3MoeConfig(
        **_QWEN_3_MOE,
        **{"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 94, "num_attention_heads": 64},
        moe_intermediate_size=1536,
    ),
    "Qwen/Qwen2.5-7B": Qwen2Config(
        **{"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"vocab_size": 152_064, "num_key_value_heads": 4, "max_position_embeddings": 131_072},
        rope_theta=1_000_000.0,
    ),
    "FacebookAI/roberta-large": RobertaConfig(
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    # launch/quickstart/pretrain.py makes it.
    ".quickstart/smoke/model": LlamaConfig(
        **{"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"vocab_size": 1024, "num_key_value_heads": 4, "max_position_embeddings": 512},
        tie_word_embeddings=True,
    ),
}

# Weights in all, with the head that the recipe's task has (two classes for the encoder), as published.
WEIGHTS = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "FacebookAI/roberta-large": 355_361_794,
}
