"""PEFT's own layer on the fixture's matrix, filled from a file of ours: an independent reference."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dist_subspace.subspace import SubspacePart
from tests.subspace.golden import BIAS, W


class One(nn.Module):
    """A model of one linear layer, `proj`."""

    def __init__(self, weight: Tensor, bias: Tensor, transposed: bool) -> None:
        super().__init__()
        self.proj = Conv1D(*weight.shape) if transposed else nn.Linear(*reversed(weight.shape))
        self.proj.weight.data = weight.t().contiguous() if transposed else weight.clone()
        self.proj.bias.data = bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def peft_model(
    part: SubspacePart, weight: Tensor = W, bias: Tensor = BIAS, *, transposed: bool = False
) -> peft.PeftModel:
    """PEFT's model of the part's kind, with the part's file loaded by PEFT; it refuses names that it does not know."""
    config = peft.get_peft_config(
        {
            "peft_type": part.info.peft_type,
            "target_modules": ["proj"],
            "fan_in_fan_out": transposed,
            **part.peft.entries(part.settings),
        }
    )
    model = peft.get_peft_model(One(weight, bias, transposed), config)
    tensors = file_of(part.file_tensors())
    found = peft.set_peft_model_state_dict(model, tensors)
    assert not found.unexpected_keys
    stored = peft.get_peft_model_state_dict(model)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in stored)
    return model.eval()


def file_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a file whose only layer is `proj`."""
    prefix = "base_model.model.proj."
    return {key if key.startswith("base_model.") else prefix + key: t.clone() for key, t in tensors.items()}
