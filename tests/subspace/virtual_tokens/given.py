"""Tiny models with virtual tokens at random values, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, trainable_parameters
from tests.tiny_models import VOCABULARY, tiny_model

COUNT = 4
METHODS = ("prefix", "prompt", "p-tuning")
DECODERS = ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "MistralForCausalLM", "GPTNeoXForCausalLM")


def config(method: str, **options: Any) -> SubspaceConfig:
    return SubspaceConfig(method=method, options={"num_virtual_tokens": COUNT, **options})


def model_with(method: str, family: str = "LlamaForCausalLM", spread: float = 0.5, **options: Any) -> Any:
    """The family's tiny model with the method, its trained values random."""
    model = attach(tiny_model(family), config(method, **options))
    with torch.no_grad():
        for number, parameter in enumerate(trainable_parameters(model)):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def ids(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(samples: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Samples `(length,)` as one batch with its mask."""
    width = max(len(s) for s in samples)
    rows, masks = [], []
    for sample in samples:
        gap, ones = sample.new_zeros(width - len(sample)), torch.ones_like(sample)
        rows.append(torch.cat([sample, gap] if side == "right" else [gap, sample]))
        masks.append(torch.cat([ones, gap] if side == "right" else [gap, ones]))
    return torch.stack(rows), torch.stack(masks)


def greedy(model: nn.Module, prompt: Tensor, steps: int, mask: Tensor | None = None) -> Tensor:
    """The most likely tokens, each from a whole forward without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=prompt, attention_mask=mask, use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return prompt
