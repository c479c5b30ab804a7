"""One small model folder for each way in which a file holds weights, in two files and an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantised_folders import FILE, fp8_blocks, matrices, rewritten, save_bitsandbytes, save_plain
from tests.tiny_models import tiny_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def mixture(folder: Path) -> Path:
    """Experts one by one in the file, one stack in the model."""
    sizes = {"moe_intermediate_size": 128, "num_experts": 3, "num_experts_per_tok": 2, "hidden_size": 128}
    config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, head_dim=32)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def gpt_oss(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = tiny_config("GptOssConfig", **sizes, head_dim=16, num_key_value_heads=2)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return rewritten(folder, in_mxfp4, quantization_config=MXFP4)


def in_mxfp4(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, d_in, d_out = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 126, (experts, d_out, d_in // 32), dtype=torch.uint8)


def in_fp8(tensors: dict[str, Tensor]) -> None:
    for key in matrices(tensors):
        tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))


def _bitsandbytes(**settings: Any) -> Callable[[Path], Path]:
    return lambda folder: save_bitsandbytes(folder, save_plain(folder.with_name(f"{folder.name} plain")), **settings)


# The storage that holds what the file holds, and how the folder is made.
FORMATS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "plain": ("nf4", save_plain),
    "bitsandbytes 4 bits": ("fp4", _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True)),
    "bitsandbytes 8 bits": ("int8", _bitsandbytes(load_in_8bit=True)),
    "fp8": ("fp8", lambda folder: rewritten(save_plain(folder), in_fp8, quantization_config=FP8)),
    "mxfp4": ("nf4", gpt_oss),
    "experts": ("nf4", mixture),
    "experts in fp8": ("fp8", lambda folder: rewritten(mixture(folder), in_fp8, quantization_config=FP8)),
}


def in_two_files(folder: Path) -> Path:
    """Every other tensor lies in the second file: codes and statistics of a weight apart, experts of a stack apart."""
    tensors = load_file(folder / FILE)
    places = {key: (FIRST, SECOND)[number % 2] for number, key in enumerate(sorted(tensors))}
    for file in (FIRST, SECOND):
        own = {key: value for key, value in tensors.items() if places[key] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / FILE).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
