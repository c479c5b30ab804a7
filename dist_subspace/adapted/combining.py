"""Several adapters as one: the weighted sum of their updates, from their files alone, and exact.

Products of thin matrices add up to such a product, `Σ w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]`: a LoRA whose rank
is the sum of theirs, cut to the layer's smaller side where it is above that, which loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_subspace.adapted.source import adapter_folder
from dist_subspace.atomic_files import whole_folder
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import write_adapter
from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.base_model import FINGERPRINT
from dist_subspace.interchange.description import OWN, STACKS
from dist_subspace.interchange.parts_without_base import parts_without_base
from dist_subspace.interchange.peft.forms import Pair, cut, forms_of, lora_of
from dist_subspace.interchange.peft.trained_in_full import of_no_layer
from dist_subspace.interchange.peft.written_forms import OF_EVERY_KIND, lora_files
from dist_subspace.placement.collectives import on_main
from dist_subspace.subspace import SubspaceConfig, SubspaceLinear

_OF_LAYERS = ("shapes", "biased")  # of our entries, joined; the others are the first adapter's
_KEPT = ("format", "conv1d", "base", "own_class", FINGERPRINT, "prompts")


def combine_adapters(weights: Mapping[str | Path, float], out: str | Path) -> Path:
    """Collective: write the weighted sum of adapters of one base as a LoRA adapter; rank 0 alone reads and writes.

    It is loaded, asked, merged and exported as any other, and PEFT reads it too. How its prompts are written, and in which
    storage its base is held, are the first adapter's.

    Arguments:
        weights: of each update, by the folder of its adapter, checkpoint or run: `{"runs/a": 0.7, "runs/b": 0.3}`.
        out: the folder to write, which must not exist or be empty.

    Raises:
        UsageError: fewer than one adapter, a weight that is no finite number, a method whose update is no product of thin
            matrices, modules that were trained in full, new tokens, experts, another base. StorageError: the disk refuses.
    """
    return on_main(_combined, dict(weights), Path(out))


def _combined(weights: dict[str | Path, float], out: Path) -> Path:
    if not weights:
        raise UsageError("weights is empty; accepted: at least one adapter and its weight")
    opened = {path: AdapterFolder(adapter_folder(path), verify=True) for path in weights}
    first = next(iter(opened.values()))
    terms: dict[str, list[Pair]] = {}
    for path, adapter in opened.items():
        _check(path, adapter, first, weights[path])
        for layer, (a, b) in _pairs(path, adapter).items():
            terms.setdefault(layer, []).append((a, weights[path] * b))
    pairs = {layer: _sum(found) for layer, found in terms.items()}
    entries, tensors = lora_files(pairs, first.described)
    described = {key: value for key, value in first.described.items() if key in OF_EVERY_KIND} | entries
    described["target_modules"] = sorted(pairs)
    with whole_folder(out) as hidden:
        write_adapter(hidden, tensors, described | {OWN: _own(opened, entries, list(pairs))}, first.tokenizer())
    return out


def _check(path: str | Path, adapter: AdapterFolder, first: AdapterFolder, weight: float) -> None:
    named = f"the adapter of {str(path)!r}"
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"the weight of {str(path)!r} is {weight!r}; accepted: a finite number")
    if not adapter.ours:
        raise UsageError(f"{named} is PEFT's; accepted: what `dist-subspace import` makes of it")
    beside = of_no_layer(adapter.tensors(factors=False), adapter.layers)
    if beside or adapter.config.modules_to_save or adapter.config.new_tokens or adapter.ours.get(STACKS):
        raise UsageError(
            f"{named} has more than updates of linear layers ({_what(adapter)}), which do not add up without the base; accepted: "
            "adapters without it"
        )
    for name in (FINGERPRINT, None):
        ours, theirs = (_base(folder, name) for folder in (adapter, first))
        if ours != theirs:
            raise UsageError(f"{named} is of another base than {str(first.path)!r}; accepted: adapters of one base")


def _base(adapter: AdapterFolder, name: str | None) -> Any:
    """By its fingerprint; of a hub's by its name."""
    known = adapter.ours.get(FINGERPRINT)
    return known if name is not None else (known or adapter.described.get("base_model_name_or_path"))


def _what(adapter: AdapterFolder) -> str:
    config = adapter.config
    found = {
        "modules_to_save": config.modules_to_save,
        "new tokens": config.new_tokens,
        "experts": adapter.ours.get(STACKS),
    }
    return ", ".join(name for name, there in found.items() if there) or "virtual tokens"


def _pairs(path: str | Path, adapter: AdapterFolder) -> dict[str, Pair]:
    """`(A, B)` of each layer, with ΔW = B A."""
    biased, pairs = adapter.ours.get("biased") or [], {}
    for layer, part in parts_without_base(adapter):
        form = forms_of(layer, part, layer in biased, None, base=False)
        if form is None or form.numbers is None or not isinstance(part, SubspaceLinear):
            raise UsageError(
                f"the adapter of {str(path)!r} is of method {adapter.config.method}, whose update of {layer} is no product of "
                "thin matrices; accepted: methods that are exported as an exact LoRA"
            )
        pairs[layer], _, _ = lora_of(layer, part, form, None)
    if set(pairs) != set(adapter.layers):
        raise UsageError(
            f"the adapter of {str(path)!r} is of method {adapter.config.method}, which stands on no linear layers; accepted: "
            "methods that are exported as an exact LoRA"
        )
    return pairs


def _sum(pairs: list[Pair]) -> Pair:
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    most = min(a.shape[1], b.shape[0])
    if len(a) <= most:
        return a, b
    pair, _, _ = cut(b @ a, most)
    return pair


def _own(opened: Mapping[Any, AdapterFolder], entries: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    first = next(iter(opened.values())).ours
    kept = {name: first[name] for name in _KEPT if name in first}
    shapes: dict[str, Any] = {}
    biased: dict[str, None] = {}
    for adapter in opened.values():
        shapes |= adapter.ours.get("shapes") or {}
        biased |= dict.fromkeys(adapter.ours.get("biased") or [])
    config = SubspaceConfig(
        method="lora",
        rank=entries["r"],
        alpha=float(entries["r"]),
        target_modules=layers,
        rank_pattern=entries["rank_pattern"],
        alpha_pattern={name: float(rank) for name, rank in entries["rank_pattern"].items()},
    )
    return {**kept, "layers": layers, "shapes": shapes, "biased": list(biased), **config.as_dict()}
