"""How an adapter's file names its tensors. Local."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dist_subspace.subspace.core.peft_words import PREFIX
from dist_subspace.subspace.core.registry import file_spelling
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

FACTOR = "factor."  # before a frozen factor's own name


def file_key(layer: str, suffix: str) -> str:
    """A tensor's name in the file; a suffix that begins as PEFT's names do is a name of the whole model already."""
    whole = suffix.startswith("base_model.") or suffix == EMBEDDINGS
    return suffix if whole else f"{PREFIX}{layer}.{file_spelling().get(suffix, suffix)}"


def factor_key(layer: str, name: str) -> str:
    """The name of a layer's frozen factor in the file."""
    return f"{PREFIX}{layer}.{FACTOR}{name}"


def current_key(key: str) -> str:
    """The key that this version writes for the same tensor."""
    start, _, suffix = key.rpartition(".")
    return f"{start}.{file_spelling()[suffix]}" if suffix in file_spelling() else key


def split_factors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A file's tensors as frozen factors by layer name, and the trained rest."""
    factors: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, mark, name = key.removeprefix(PREFIX).rpartition(f".{FACTOR}")
        if mark:
            factors.setdefault(layer, {})[name] = tensor
        else:
            trained[key] = tensor
    return factors, trained
