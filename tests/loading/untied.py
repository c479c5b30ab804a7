"""Folders whose configuration ties parameters that the file holds with different values, of several families."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_config

# name of the case -> class, task of load_frozen, configuration. "flan" is what google/flan-t5's config.json says.
CASES: dict[str, tuple[str, str, Any]] = {
    "llama": ("LlamaForCausalLM", "causal-lm", tiny_config("LlamaConfig")),
    "gpt2": ("GPT2LMHeadModel", "causal-lm", tiny_config("GPT2Config")),
    "bert": ("BertForMaskedLM", "masked-lm", tiny_config("BertConfig")),
    "roberta": ("RobertaForMaskedLM", "masked-lm", tiny_config("RobertaConfig")),
    "t5": ("T5ForConditionalGeneration", "seq2seq-lm", tiny_config("T5Config", num_layers=1)),
    "flan": (
        "T5ForConditionalGeneration",
        "seq2seq-lm",
        tiny_config("T5Config", num_layers=1, tie_word_embeddings=False),
    ),
    "umt5": ("UMT5ForConditionalGeneration", "seq2seq-lm", tiny_config("UMT5Config", num_layers=1)),
    "bart": ("BartForConditionalGeneration", "seq2seq-lm", tiny_config("BartConfig")),
    "marian": ("MarianMTModel", "seq2seq-lm", tiny_config("MarianConfig")),
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
