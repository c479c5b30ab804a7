"""Packed samples on the device: alone and together they lose the same, each with the attention kernel that makes no mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from dist_subspace import SubspaceConfig, attach
from dist_subspace.training.data import enable_packing, packing_leak
from tests.gpu.device import DEVICE
from tests.tiny_models import tiny_config

LENGTHS = (9, 1, 13, 5, 7)
CONFIGS: dict[str, Any] = {
    "llama": tiny_config("LlamaConfig", hidden_size=64, intermediate_size=96),
    "gpt2": tiny_config("GPT2Config", n_embd=64),
}


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").to(DEVICE, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    attach(model, SubspaceConfig(method="lora", rank=4))
    return model.eval()


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator).to(DEVICE) for length in LENGTHS]


def logits(model: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    positions = torch.cat([torch.arange(len(part), device=DEVICE) for part in parts])[None]
    return model(input_ids=torch.cat(parts)[None], position_ids=positions, use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("name", "dtype", "kernel", "tolerance"),
    [
        # torch's efficient attention has no grouped heads, so a LLaMA in float32 takes the one of plain products.
        ("gpt2", torch.float32, SDPBackend.EFFICIENT_ATTENTION, 1e-4),
        ("gpt2", torch.bfloat16, SDPBackend.FLASH_ATTENTION, 6e-2),
        ("llama", torch.float32, SDPBackend.MATH, 1e-4),
        ("llama", torch.bfloat16, SDPBackend.FLASH_ATTENTION, 6e-2),
    ],
)
def test_packed_samples_are_alone_on_every_kernel(
    name: str, dtype: torch.dtype, kernel: SDPBackend, tolerance: float
) -> None:
    """A kernel that takes no mask (flash) would refuse one: nothing of tokens x tokens is made."""
    model, parts = model_of(name, dtype), samples()
    with torch.no_grad():
        alone = torch.cat([logits(model, [part]) for part in parts])
        enable_packing(model)
        with sdpa_kernel(kernel):
            packed = logits(model, parts)
    torch.testing.assert_close(packed.float(), alone.float(), rtol=tolerance, atol=tolerance * float(alone.abs().max()))
    assert packing_leak(model, parts[0], parts[2]) < 1e-3


def test_the_memory_of_packed_attention_grows_with_the_tokens_and_not_with_their_square() -> None:
    model = model_of("llama", torch.bfloat16).train()
    enable_packing(model)
    peaks = []
    for length in (2048, 8192):
        parts = [torch.randint(3, 64, (length // 8,), device=DEVICE) for _ in range(8)]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        begin = torch.cuda.memory_allocated(DEVICE)
        logits(model, parts).float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated(DEVICE) - begin)
    assert peaks[1] < 5 * peaks[0]
