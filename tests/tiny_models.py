"""Random transformers of a few thousand weights, and their inputs: one factory for the configurations of all families.

`tiny_model` makes one of the common families, `odd_model` one whose widths nothing divides, `vision_model` one that sees. A test
that needs another size or another family says so as overrides of `tiny_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_T5 |= {"decoder_start_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "max_position_embeddings": 64}
_BART |= {"decoder_start_token_id": 0, "forced_eos_token_id": 2}
_GPTJ = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
_DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
_DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_DEEPSEEK |= {"intermediate_size": 44, "first_k_dense_replace": 1}

# What a family has beside the common sizes; one that is not named has these and `intermediate_size`.
_SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"intermediate_size": 44, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2Config": {"intermediate_size": 44, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "MistralConfig": {"intermediate_size": 44, "num_key_value_heads": 2},
    "GPTNeoXConfig": {"intermediate_size": 44},
    "OPTConfig": {"ffn_dim": 44, "word_embed_proj_dim": 32, "dropout": 0.0},
    "BertConfig": {"intermediate_size": 44, **_NO_DROPOUT},
    "RobertaConfig": {"intermediate_size": 44, **_NO_DROPOUT},
    "AlbertConfig": {"intermediate_size": 44, "embedding_size": 16, **_NO_DROPOUT},
    "DistilBertConfig": {"hidden_dim": 44, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "DeepseekV3Config": _DEEPSEEK,
}
# Families with names of their own for all of it.
_OWN_NAMES: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "XLNetConfig": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 44, "d_head": 8},
    **dict.fromkeys(("GPTJConfig", "CodeGenConfig"), _GPTJ),
    **dict.fromkeys(("T5Config", "UMT5Config"), _T5),
    **dict.fromkeys(("BartConfig", "MarianConfig", "M2M100Config"), _BART),
}

# class -> (configuration, task of load_frozen)
FAMILIES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("LlamaConfig", "causal-lm"),
    "GPT2LMHeadModel": ("GPT2Config", "causal-lm"),
    "OPTForCausalLM": ("OPTConfig", "causal-lm"),
    "Qwen2ForCausalLM": ("Qwen2Config", "causal-lm"),
    "MistralForCausalLM": ("MistralConfig", "causal-lm"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", "causal-lm"),
    "BertForMaskedLM": ("BertConfig", "masked-lm"),
    "BertForSequenceClassification": ("BertConfig", "classification"),
    "RobertaForSequenceClassification": ("RobertaConfig", "classification"),
    "T5ForConditionalGeneration": ("T5Config", "seq2seq-lm"),
}

# The layers that add to the stream of hidden states, by the ends of their names.
BLOCK_OUTPUTS = {
    "LlamaForCausalLM": {"o_proj", "down_proj"},
    "Qwen2ForCausalLM": {"o_proj", "down_proj"},
    "MistralForCausalLM": {"o_proj", "down_proj"},
    "GPT2LMHeadModel": {"attn.c_proj", "mlp.c_proj"},
    "OPTForCausalLM": {"out_proj", "fc2"},
    "GPTNeoXForCausalLM": {"attention.dense", "dense_4h_to_h"},
    "BertForMaskedLM": {"attention.output.dense", "output.dense"},
    "BertForSequenceClassification": {"attention.output.dense", "output.dense"},
    "RobertaForSequenceClassification": {"attention.output.dense", "output.dense"},
    "T5ForConditionalGeneration": {"SelfAttention.o", "EncDecAttention.o", "wo"},
}


def tiny_config(name: str, **overrides: Any) -> Any:
    """The configuration of transformers' named class at the tiny sizes, where `overrides` do not say otherwise."""
    sizes = _OWN_NAMES.get(name) or _COMMON | _SIZES.get(name, {"intermediate_size": 44})
    return getattr(transformers, name)(**{"vocab_size": VOCABULARY, **sizes, **_SPECIAL, **overrides})


def tiny_model(name: str = "LlamaForCausalLM", *, seed: int = 0, config_name: str | None = None, **changes: Any) -> Any:
    """A model of the named transformers class, in evaluation; biases and norms are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(tiny_config(config_name or FAMILIES[name][0], **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.eval()


def tiny_inputs(model: nn.Module, *, rows: int = 2, length: int = 7, labels: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    if labels:
        inputs["labels"] = inputs.pop("decoder_input_ids", ids).clone()
        if "Classification" in type(model).__name__:
            inputs["labels"] = torch.arange(rows) % 2
    return inputs


def logits(model: nn.Module, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**(tiny_inputs(model) | changes)).logits


# Widths that neither 64 nor the number of ranks divides; every linear layer has a bias.
ODD_VOCABULARY = 19
_MARKS = {"vocab_size": ODD_VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
_ODD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "num_hidden_layers",
        {"hidden_size": 45, "intermediate_size": 35, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
        | {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 32, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2Config", "n_layer", {"n_embd": 45, "n_inner": 35, "n_head": 3, "n_positions": 32}),
}


def odd_model(family: str, layers: int = 2) -> nn.Module:
    """`llama`: nn.Linear; `gpt2`: Conv1D, embeddings tied to the head, dropout off. In float32, biases and norms random too, so
    that losing one would show."""
    name, depth, sizes = _ODD[family]
    config = tiny_config(name, **_MARKS, **sizes, **{depth: layers})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn_like(parameter) * spread + (parameter.dim() == 1) * parameter)
    return model  # type: ignore[no-any-return]


def save_odd(folder: Path, family: str, layers: int = 2) -> str:
    """Write the model as a transformers folder; returns its path."""
    odd_model(family, layers).save_pretrained(folder / family)
    return str(folder / family)


# Models of more than text.
_TEXT: dict[str, Any] = {
    **_COMMON,
    **{"vocab_size": VOCABULARY, "intermediate_size": 44, "num_key_value_heads": 2, "head_dim": 8},
    **_SPECIAL,
}
_VISION = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
_DEPTH = {"depth": 1, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4, "out_hidden_size": 32}
_VIDEO = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_PROJECTED = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
_TILES = {"num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 1, "vision_output_dim": 64}

# class -> (configuration's class, text, vision, the rest)
VISION_AND_LANGUAGE: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Qwen3_5ForConditionalGeneration": (
        "Qwen3_5Config",
        {**_TEXT, **_HEADS, "layer_types": ["full_attention", "full_attention"]},
        _DEPTH,
        {**_VIDEO, "tie_word_embeddings": False},
    ),
    "Llama4ForConditionalGeneration": (
        "Llama4Config",
        {**_TEXT, "intermediate_size_mlp": 44, "num_local_experts": 2, "moe_layers": [], "attention_chunk_size": 16},
        {**_VISION, "num_hidden_layers": 1, "intermediate_size": 128, **_PROJECTED},
        {"image_token_index": 90},
    ),
    "MllamaForConditionalGeneration": (
        "MllamaConfig",
        {**_TEXT, "cross_attention_layers": [1]},
        _VISION
        | _TILES
        | {"num_hidden_layers": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        {"image_token_index": 90},
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {**_TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8},
        {**_VISION, "num_hidden_layers": 2},
        {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4},
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {**_TEXT, "model_type": "llama"},
        {**_VISION, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
        {"image_token_index": 90, "image_seq_length": 4},
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        {},
    ),
}


def vision_model(name: str) -> Any:
    """A model of the named transformers class, in evaluation."""
    kind, text, vision, more = VISION_AND_LANGUAGE[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(text_config=dict(text), vision_config=dict(vision), **more)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
