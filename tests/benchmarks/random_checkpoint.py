"""A random model of a wanted size, written file by file: no process holds more than one file's tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

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


def mixture_of(parameters: float, experts: int = 128, vocabulary: int = 32000) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with fewer layers, of about so many parameters; hidden size, heads and experts are its own."""
    hidden, intermediate, heads, key_heads, head_dim = 2048, 768, 32, 4, 128
    attention = 2 * hidden * head_dim * (heads + key_heads)
    layer = attention + experts * (3 * hidden * intermediate + hidden)
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=6144,
        moe_intermediate_size=intermediate,
        num_hidden_layers=max(1, round((parameters - 2 * vocabulary * hidden) / layer)),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    )


def write_checkpoint(folder: Path, config: PretrainedConfig) -> int:
    """A causal language model in bfloat16, normal with deviation 0.02, each expert's matrices by themselves as files of mixtures
    have them; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    names = file_shapes(config)
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


def file_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the family's files and their shapes, in the model's order."""
    with torch.device("meta"):
        held = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in held.items():
        stack = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        for number in range(shape[0]) if stack else ():
            rows, columns = shape[1:]
            own = {"down_proj": rows} if stack[2] == "down_proj" else {"gate_proj": rows // 2, "up_proj": rows // 2}
            shapes |= {
                f"{stack[1]}.{number}.{projection}.weight": (d_out, columns) for projection, d_out in own.items()
            }
        if stack is None:
            shapes[name] = shape
    return shapes


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
