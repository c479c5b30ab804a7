"""Random vision and language models of a few thousand weights, whose configurations name a class of more than text."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_TEXT: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
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
        {
            **_VISION,
            "num_hidden_layers": 1,
            **_TILES,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
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
