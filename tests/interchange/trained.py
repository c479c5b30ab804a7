"""Adapters with values away from their start, for tests of what is written from them and read back."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from tests.forked import run_lines
from tests.tiny_models import FAMILIES, tiny_model

SPREAD = 0.05


def trained(model: Any, method: str = "lora", **config: Any) -> Any:
    """The model with a method on it, and its trained values moved away from the start by what one seed draws."""
    info = dsub.methods()[method]
    given = {"rank": 3 if info.uses_rank else None, **config}
    dsub.attach(model, SubspaceConfig(method=method, **given))
    return move(model)


def move(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in dsub.trainable_parameters(model):
        parameter.data.add_(SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def saved_base(folder: Path, name: str = "LlamaForCausalLM", **changes: Any) -> Path:
    """A random tiny model as a transformers folder."""
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def frozen(folder: Path, name: str = "LlamaForCausalLM", storage: str = "fp32", **arguments: Any) -> Any:
    """It, loaded by us, computing in float32."""
    return dsub.load_frozen(folder, storage=storage, task=FAMILIES[name][1], **{"dtype": "float32", **arguments})


def saved_adapter(method: str, folder: Path, name: str = "GPT2LMHeadModel", **config: Any) -> Any:
    """A model whose adapter is away from its start, and saved."""
    rank = 4 if dsub.methods()[method].uses_rank else None
    model = dsub.attach(tiny_model(name), SubspaceConfig(method, **{"rank": rank, **config}))
    generator = torch.Generator().manual_seed(2)
    for parameter in dsub.trainable_parameters(model):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    dsub.save_adapter(model, folder)
    return model


def in_process(body: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a Python of their own, with the names that these tests use."""
    head = (
        "from pathlib import Path\nimport dist_subspace as dsub\n"
        "from tests.interchange.trained import frozen, saved_base, trained\nfrom tests.tiny_models import tiny_model\n"
    )
    return run_lines(head + textwrap.dedent(body))
