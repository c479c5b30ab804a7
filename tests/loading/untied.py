"""Folders whose configuration ties parameters that the file holds with different values, of several families."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny_models import VOCABULARY, tiny_config

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "dropout": 0.0}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "max_position_embeddings": 64}
_BART |= {"decoder_start_token_id": 0, "forced_eos_token_id": 2} | _SPECIAL
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0} | _SPECIAL
_T5 |= {"decoder_start_token_id": 0}

# name of the case -> class, task of load_frozen, configuration. "flan" is what google/flan-t5's config.json says.
CASES: dict[str, tuple[str, str, Any]] = {
    "llama": ("LlamaForCausalLM", "causal-lm", tiny_config("LlamaConfig")),
    "gpt2": ("GPT2LMHeadModel", "causal-lm", tiny_config("GPT2Config")),
    "bert": ("BertForMaskedLM", "masked-lm", tiny_config("BertConfig")),
    "roberta": ("RobertaForMaskedLM", "masked-lm", tiny_config("RobertaConfig")),
    "t5": ("T5ForConditionalGeneration", "seq2seq-lm", transformers.T5Config(**_T5)),
    "flan": ("T5ForConditionalGeneration", "seq2seq-lm", transformers.T5Config(**_T5, tie_word_embeddings=False)),
    "umt5": ("UMT5ForConditionalGeneration", "seq2seq-lm", transformers.UMT5Config(**_T5)),
    "bart": ("BartForConditionalGeneration", "seq2seq-lm", transformers.BartConfig(**_BART)),
    "marian": ("MarianMTModel", "seq2seq-lm", transformers.MarianConfig(**_BART)),
}


def made(case: str) -> Any:
    name, _, config = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pairs(case: str) -> dict[str, str]:
    """Parameter -> what it is tied to, as transformers itself says."""
    return dict(made(case).all_tied_weights_keys)


def save_untied(folder: Path, case: str, apart: Iterable[str], equal: Iterable[str] = ()) -> None:
    """The folder as `save_pretrained` writes it, with tensors of their own for the `apart` (other values) and the `equal` of
    the tied parameters."""
    model = made(case)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors, held = load_file(file), model.state_dict()
    for name in apart:
        tensors[name] = torch.randn_like(held[name])
    for name in equal:
        tensors[name] = held[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def reference(folder: Path, case: str) -> Any:
    return getattr(transformers, CASES[case][0]).from_pretrained(folder, dtype=torch.float32).eval()
