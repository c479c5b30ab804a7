"""Random transformers of a few thousand weights, one of each family, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96

_SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"intermediate_size": 44, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2Config": {"intermediate_size": 44, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "MistralConfig": {"intermediate_size": 44, "num_key_value_heads": 2},
    "GPTNeoXConfig": {"intermediate_size": 44},
    "OPTConfig": {"ffn_dim": 44, "word_embed_proj_dim": 32, "dropout": 0.0},
    "BertConfig": {"intermediate_size": 44, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "RobertaConfig": {"intermediate_size": 44, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "DistilBertConfig": {"hidden_dim": 44, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "T5Config": {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    | {"decoder_start_token_id": 0},
}
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_OWN_NAMES = ("GPT2Config", "T5Config")

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


def tiny_config(name: str, **changes: Any) -> Any:
    common = {} if name in _OWN_NAMES else _COMMON
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, name)(**{"vocab_size": VOCABULARY, **common, **_SIZES[name], **special, **changes})


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
