"""What a load has to say to the person, besides the model that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_subspace.families.experts import is_expert_matrix
from dist_subspace.placement.collectives import world
from dist_subspace.placement.for_loading import casting_section
from dist_subspace.placement.tensors import full_numel, full_shape
from dist_subspace.storage import FrozenLinear, FrozenStack, storage_info

WORTH = 0.02  # of the model's bytes: what is less needs no word
MUCH = 0.1  # the same for convolutions and other things that nobody expects to be packed


def held_dense(model: nn.Module, storage: str, dtype: torch.dtype) -> list[str]:
    """What a packed storage leaves in floating point although it is large, one sentence each: experts that a class
    multiplies with in a way of its own; other matrices that are no linear layers; layers that the family keeps in float32."""
    if storage_info(storage).dtype is not None:
        return []
    experts: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        operator = isinstance(module, FrozenLinear | FrozenStack)
        if operator or isinstance(module, nn.Linear | nn.Embedding) or "Embedding" in type(module).__name__:
            continue  # a linear layer that is no operator has its own reason, which was said (stays_dense.py)
        beside_stacks = any(isinstance(child, FrozenStack) for child in module.children())  # biases, a row an expert
        for attribute, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{attribute}".lstrip(".")
            if len(full_shape(parameter)) >= (3 if beside_stacks else 2):
                is_expert = is_expert_matrix(full_name, module, len(full_shape(parameter)))
                (experts if is_expert else others)[full_name] = parameter
    kept = {
        name: next(module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and module.storage == "fp32" and dtype != torch.float32
    }
    total = sum(map(_bytes, model.parameters()))
    sentences = []
    if experts:
        sentences.append(
            f"{_listed(experts, 'stack')} of experts, not held in {storage}: their class multiplies with them in a way of its own"
        )
    if sum(map(_bytes, others.values())) > MUCH * total:
        sentences.append(f"{_listed(others, 'tensor')} outside linear layers, not held in {storage}")
    if sum(map(_bytes, kept.values())) > WORTH * total:
        sentences.append(
            f"{_listed(kept, 'layer')}, not held in {storage}: {type(model).__name__} keeps them in float32, because they "
            f"overflow or lose too much in {str(dtype).removeprefix('torch.')}"
        )
    return sentences


def cast_by_the_engine(model: nn.Module, stage_config: Mapping[str, Any] | None, dtype: torch.dtype) -> list[str]:
    """DeepSpeed's own 16-bit engines cast every parameter that is not split, those too that the family keeps in float32."""
    section = casting_section(stage_config)
    kept = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    if section is None or not kept or dtype == torch.float32:
        return []
    return [
        f"{type(model).__name__} keeps {kept[0]}{f' and {len(kept) - 1} more' if kept[1:] else ''} in float32, but DeepSpeed "
        f"casts them with {section[0]}.enabled at stage {section[1]}; one of the presets, or stage 3, leaves them as they are"
    ]


def read_by_every_rank(names: list[str], share: float) -> list[str]:
    """Parameters that every rank has read whole to keep a part of them, where they are a share of the checkpoint that counts."""
    ranks = world().size
    if ranks == 1 or share < WORTH:
        return []
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({share:.0%} of the checkpoint) were read whole by each "
        f"of the {ranks} ranks: transformers makes them of other tensors of the file"
    ]


def _bytes(parameter: Any) -> int:
    return full_numel(parameter) * int(parameter.element_size())


def _listed(held: Mapping[str, Any], noun: str) -> str:
    """How many, in which types, how large over all ranks, and the first names."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in held.values()})
    size = sum(map(_bytes, held.values()))
    text = f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
    names = ", ".join(list(held)[:2]) + (", ..." if len(held) > 2 else "")
    return f"{text} are {' and '.join(kinds)}: {len(held)} {noun}{'s' if len(held) > 1 else ''} ({names})"
