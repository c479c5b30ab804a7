"""A model, a tokenizer and records so small that a whole run takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import tiny_config

POSITIONS = 128


def make_model(folder: Path, seed: int = 0, layers: int = 2, width: int = 32, tied: bool = False) -> Path:
    """A LLaMA of width 32 with two key heads (k_proj is 16 x 32), bytes for tokens, saved as transformers saves it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 52, "num_hidden_layers": layers}
    marks = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    own = {"max_position_embeddings": POSITIONS, "tie_word_embeddings": tied}
    config = tiny_config("LlamaConfig", **sizes, **marks, **own)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with begin and end marks and no pad token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def make_records(file: Path, count: int) -> Path:
    """Alpaca records of differing lengths that can be learned."""
    rows = [{"instruction": f"say {n % 7}", "output": f"{n % 7} " * (1 + n % 3)} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_bert(folder: Path, kind: Any) -> None:
    """A tiny BERT's base, as a checkpoint of the given class has it: a masked language model's lacks the pooler."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config("BertConfig", vocab_size=len(tokenizer), num_attention_heads=2, **dropout)
    kind(config).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
