"""Weights of the base that PEFT wrote into an adapter's file beside it: those of embeddings and output layers, "to be safe".

They are copies if the base's vocabulary was not changed, and PEFT puts them over the base's own when it reads them. Here they are
compared with the base's, by a sample, and left out; where they differ, another base was trained beside, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.loaded_adapter import Copies
from dist_subspace.placement.collectives import agreed
from dist_subspace.placement.tensors import full_shape, gathered
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace.core.peft_words import PREFIX

SAMPLES = 256
ROUNDING = 2.0**-7  # of bfloat16, in which a base may be held


def split_copies(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], Copies]:
    """The tensors of the method, and what the file says of the base's own parameters.

    Arguments:
        prefix: how the method's tensors are called, after the layer's name.
    """
    of_the_method = re.compile(rf"(^|\.){prefix}")
    of_method: dict[str, Tensor] = {}
    copies: dict[str, Mapping[str, Any]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if key.startswith(PREFIX) and name.endswith((".weight", ".bias")) and not of_the_method.search(name):
            copies[name] = {"shape": list(tensor.shape), "sample": _sample(tensor)}
        else:
            of_method[key] = tensor
    return of_method, copies


def check_copies(model: nn.Module, copies: Copies) -> None:
    """Collective where parameters are split. Raises UsageError for a model whose own weights are others."""
    if not copies:
        return
    with agreed("finding the base's own weights"):
        held_here = {name: _parameter(model, name) for name in copies}
    with gathered([parameter for parameter, _ in held_here.values()]), agreed("comparing the base's own weights"):
        for name, (parameter, module) in held_here.items():
            if isinstance(module, FrozenLinear) and not module.is_float and name.endswith(".weight"):
                continue  # it is held with an error of its own
            wanted, held = torch.tensor(copies[name]["sample"]), torch.tensor(_sample(parameter))
            if list(parameter.shape) != copies[name]["shape"] or not torch.allclose(
                held, wanted, rtol=ROUNDING, atol=1e-6
            ):
                raise _other(name)


def _parameter(model: nn.Module, name: str) -> tuple[nn.Parameter, nn.Module]:
    place, _, key = name.rpartition(".")
    module = dict(model.named_modules()).get(place)
    if module is None or (isinstance(module, FrozenLinear) and key == "bias" and module.bias is None):
        raise _other(name)
    parameter = (
        next(module.parameters())
        if key == "weight" and isinstance(module, FrozenLinear)
        else getattr(module, key, None)
    )
    if parameter is None or len(full_shape(parameter)) == 0:
        raise _other(name)
    return parameter, module


def _other(name: str) -> UsageError:
    return UsageError(
        f"the adapter holds {PREFIX}{name}, which is not known here: it is no copy of this model's own, so that it was trained, "
        "or the vocabulary was changed; accepted: a base model that has it, or modules_to_save"
    )


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    values: list[float] = flat[places.to(flat.device)].float().cpu().tolist()
    return values
