"""A small LLaMA and its tokenizer, both trained here, with plain torch, in about a minute."""

from __future__ import annotations

import time
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT, BATCH = 128, 16  # tokens of a row, rows of a step
VOCABULARY = 1024
SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of these texts, with a begin mark before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def small_llama(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4 * CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(model: Any, tokens: torch.Tensor, steps: int, most_seconds: float) -> float:
    """Plain next-token training; the mean loss of the last steps. The time is a limit for slow machines only."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # With AdamW alone the model learns too little in this time to have anything that fine-tuning could draw on.
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    groups = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    draw = torch.Generator().manual_seed(0)
    recent: list[float] = []
    start = told = time.monotonic()
    step = 0
    while (done := max(step / steps, (time.monotonic() - start) / most_seconds)) < 1:
        for group, peak in groups:
            group["lr"] = peak * min(1.0, done / 0.03, (1 - done) / 0.6)
        loss = next_token_loss(model, tokens, draw)
        model.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        step += 1
        recent = [*recent[-29:], loss.item()]
        if time.monotonic() - told > 10:
            told = time.monotonic()
            mean = sum(recent) / len(recent)
            print(f"  pretraining: step {step} of {steps}, {told - start:.0f} s, loss {mean:.2f}", flush=True)
    return sum(recent) / len(recent)


def next_token_loss(model: Any, tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The loss of a batch of rows from random places of the text."""
    places = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,), generator=draw)
    rows = torch.stack([tokens[place : place + CONTEXT + 1] for place in places.tolist()])
    logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
