"""What vLLM makes of an adapter folder, by the rules of its loader, written out here because vLLM needs a GPU build.

Read in vllm-project/vllm (vllm/lora/peft_helper.py, utils.py `parse_fine_tuned_lora_name`, lora_model.py, lora_weights.py):

* `adapter_config.json` must have r, lora_alpha and target_modules; `bias` other than none, `use_dora` and `modules_to_save` are
  refused; patterns are not read. One scale for all layers: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
* Every tensor is named `base_model.model.<module>.lora_A.weight` or `...lora_B.weight`; any other name is an error.
* lora_A is `(rank, d_in)`, lora_B `(d_out, rank)`, with a rank of at most r, because buffers are allocated for r.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PREFIX = "base_model.model."


def read(folder: Path) -> tuple[float, dict[str, dict[str, Tensor]]]:
    """The scale, and `lora_A`, `lora_B` by module."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    assert not missing, f"Missing required configuration fields: {missing}"
    assert not config.get("modules_to_save"), "vLLM only supports modules_to_save being None."
    assert not config.get("use_dora"), "vLLM does not yet support DoRA."
    assert config.get("bias", "none") == "none", "Adapter bias is not supported."
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        known = name.startswith(PREFIX) and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        assert known, f"{name} is unsupported LoRA weight"
        layers.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    for module, pair in layers.items():
        assert pair.keys() == {"lora_A", "lora_B"}, module
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] <= rank, module
    return scale, layers


def apply(model: nn.Module, folder: Path) -> nn.Module:
    """The plain model with what vLLM would add to each of its linear layers."""
    scale, layers = read(folder)
    with torch.no_grad():
        for name, pair in layers.items():
            module = model.get_submodule(name)
            update = scale * pair["lora_B"] @ pair["lora_A"]
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight += update.t() if type(module).__name__ == "Conv1D" else update
    return model
