"""A random LLaMA of a wanted size, written file by file: no process holds more than one file's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FILE_BYTES = 1 << 28
# (parameters from which on, hidden, intermediate, heads)
SHAPES = ((4e9, 4096, 11008, 32), (8e8, 2048, 5632, 32), (0, 1024, 2816, 16))


def config_of(parameters: float, vocabulary: int = 32000) -> LlamaConfig:
    """A LLaMA of about so many parameters, embedding and head apart from one another."""
    _, hidden, intermediate, heads = next(shape for shape in SHAPES if parameters >= shape[0])
    layer = 4 * hidden * hidden + 3 * hidden * intermediate
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round((parameters - 2 * vocabulary * hidden) / layer)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def write_checkpoint(folder: Path, config: LlamaConfig) -> int:
    """bfloat16, normal with the family's own deviation; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in names.items():
        if files[-1] and size + 2 * torch.Size(shape).numel() > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += 2 * torch.Size(shape).numel()
    index, total = {}, 0
    for number, held in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: _random(names[name], generator) for name in held}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(held, file)
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    return total


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
