"""Adapters that PEFT has trained and saved, and ours that PEFT is to read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.subspace import attached
from tests.interchange.trained import trained
from tests.tiny_models import logits, tiny_model

LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"
LINEAR = {LLAMA: ["q_proj", "v_proj", "up_proj", "down_proj"], GPT2: ["c_attn", "c_fc", "mlp.c_proj"]}

# What becomes of each of the 32 methods, and what PEFT is told.
DIRECT = {
    **{"lora": "LORA", "rslora": "LORA", "dora": "LORA", "lora-fa": "LORA", "adalora": "ADALORA", "vera": "VERA"},
    **{"miss": "MISS", "oft": "OFT", "ia3": "IA3"},
    **{"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"},
}
NOT_ON_CONV1D = ("miss", "oft")  # PEFT's own layers of these stand on linear layers alone

# What a method needs for PEFT to know the same adapter.
OPTIONS: dict[str, dict[str, Any]] = {
    "ia3": {"scale_bias": True},  # as PEFT does, where a layer has a bias
    "svdiff": {"top_k": 2},
    "oft": {"oft_block_size": 4},  # a divisor of every layer's inputs, about which PEFT says nothing
    "sam-parser": {"top_k": 2},
}


def written(folder: Path, config: Any, name: str = LLAMA, **changes: Any) -> tuple[Path, Tensor]:
    """An adapter that PEFT trained and saved, and the logits of PEFT's own reading of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(name, **changes), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(tiny_model(name, **changes), folder).eval()
        return folder, logits(again)


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": LINEAR[LLAMA], "task_type": "CAUSAL_LM", **fields}
    )


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected[:, -actual.shape[1] :]  # PEFT keeps the logits of virtual tokens
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_imported(model: Any, folder: Path, expected: Tensor, method: str, tolerance: float = 1e-5) -> Any:
    model = dsub.import_peft(model, folder)
    assert attached(model).info.name == method
    with dsub.disabled(model):
        assert not torch.allclose(logits(model), expected[:, -logits(model).shape[1] :], atol=1e-3), "nothing was read"
    assert_near(logits(model), expected, tolerance)
    return model


def pruned(folder: Path) -> tuple[Path, Tensor]:
    """An AdaLoRA whose budget has cut layers down to different ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=4, tinit=1, tfinal=1, deltaT=1,
                                    target_modules=LINEAR[LLAMA], task_type="CAUSAL_LM")  # fmt: skip
        model = peft.get_peft_model(tiny_model(), config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(3))
        for step in range(1, 5):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(folder)
        return folder, logits(peft.PeftModel.from_pretrained(tiny_model(), folder).eval())


def model_with(method: str, name: str = "LlamaForCausalLM", **config: Any) -> Any:
    """A trained adapter, with something in every part of it: of a schedule's switch too."""
    options = {**OPTIONS.get(method, {}), **config.pop("options", {})}
    model = trained(tiny_model(name), method, options=options, **config)
    for module in model.modules():
        if method == "lora-dash" and hasattr(module, "dash_U"):
            generator = torch.Generator().manual_seed(2)
            module.dash_U.copy_(torch.randn(module.dash_U.shape, generator=generator))
            module.dash_V.copy_(torch.randn(module.dash_V.shape, generator=generator))
    return model
