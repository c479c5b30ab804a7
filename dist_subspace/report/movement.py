"""How far an adapter moved each layer, and in how many directions: from its files alone, without a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_subspace.interchange.adapter_folder import AdapterFolder
from dist_subspace.interchange.parts_without_base import parts_without_base
from dist_subspace.subspace import LowRankForm, RotationForm, ScalingForm, StackedPart, SubspacePart
from dist_subspace.subspace.blocks.low_rank import LowRankPair, with_core_left
from dist_subspace.subspace.blocks.spectral import SpectralLinear
from dist_subspace.subspace.core.peft_words import PREFIX, by_pattern
from dist_subspace.subspace.core.registry import peft_words
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

UPDATE, SCALING, SHIFT, FACTORS, TOKENS = "update", "scaling", "shift", "factors", "tokens"
VALUES, ROTATION = "values", "rotation"

# What a norm is of, by kind.
MEANING = {
    UPDATE: "‖ΔW‖: the Frobenius norm of the update of the frozen matrix",
    SCALING: "‖s - 1‖: the norm of a layer's scales, as deviations from one",
    SHIFT: "‖δ‖: the norm of what is added to a layer's bias, or scales a norm",
    FACTORS: "the Frobenius norm of the product of a layer's factors (what it does to W is no fixed ΔW)",
    TOKENS: "the Frobenius norm of the virtual tokens",
    ROTATION: "‖R - I‖: the Frobenius distance of a layer's rotation from none",
    VALUES: "‖θ‖: the norm of a layer's trained values (what they do to W is told by its shape too)",
}
RANK_MEANING = "effective rank: exp of the entropy of the singular values' shares of their sum"


@dataclass(frozen=True)
class Movement:
    """What became of one layer.

    kind: what the numbers are of (`MEANING`); norm: Frobenius; largest: the largest singular value, or the largest entry where
    there are no singular values; effective_rank: at most `rank`; None where the layer's values are no matrix; angle: of a
    rotation, the largest by which it turns a direction, in degrees; trained: how many values were.
    """

    layer: str
    kind: str
    norm: float
    largest: float
    effective_rank: float | None = None
    rank: int | None = None
    trained: int = 0
    angle: float | None = None


def movements(adapter: AdapterFolder) -> Iterator[Movement]:
    """One for each of the adapter's parts, in its order."""
    by_part = {
        layer: replace(part_movement(layer, part), trained=sum(p.numel() for p in part.trainables().values()))
        for layer, part in parts_without_base(adapter)
    }
    for layer in adapter.layers or _layers_of_peft(adapter):
        movement = by_part[layer] if layer in by_part else tensors_movement(layer, adapter)
        if movement is not None:
            yield movement


def part_movement(layer: str, part: SubspacePart) -> Movement:
    """Of a part with its values in it."""
    if isinstance(part, StackedPart):
        return _of_experts(layer, [part_movement(layer, part.expert(number)) for number in range(part.experts)])
    with torch.no_grad():
        core = _between_orthonormal(part)
        if core is not None:
            return _of_spectrum(layer, UPDATE, core.abs() if core.dim() == 1 else torch.linalg.svdvals(core))
        if isinstance(part, RotationForm):
            return of_rotation(layer, part.rotation())
        pair = part.low_rank_form() if isinstance(part, LowRankForm) else None
        if pair is not None:
            return of_product(layer, UPDATE, *pair)
        if isinstance(part, ScalingForm):
            return of_values(layer, SCALING, [s - 1 for s in part.scaling_form() if s is not None])
        if isinstance(part, LowRankPair):
            return of_product(
                layer, FACTORS, with_core_left(part.core(), part.lora_A.float()), part.scale * part.lora_B
            )
        trainables = part.trainables()
        if "adapter_up" in trainables:
            return of_product(layer, FACTORS, trainables["adapter_down"], trainables["adapter_up"])
        return of_values(layer, SHIFT, list(trainables.values()))


def tensors_movement(layer: str, adapter: AdapterFolder) -> Movement | None:
    """Of a part that is known by its tensors alone: on a norm, beside the model, or in an adapter of PEFT."""
    if EMBEDDINGS in adapter.keys:
        tokens = adapter.tensor(EMBEDDINGS)
        return replace(_of_spectrum(layer, TOKENS, torch.linalg.svdvals(tokens.float())), trained=tokens.numel())
    tensors = {suffix: adapter.tensor(key) for suffix, key in adapter.suffixes(layer).items()}
    moved = _of_tensors(layer, tensors, adapter) if tensors else None
    return None if moved is None else replace(moved, trained=sum(t.numel() for t in tensors.values()))


def _of_tensors(layer: str, tensors: dict[str, Tensor], adapter: AdapterFolder) -> Movement:
    if "adapter_up" in tensors:
        return of_product(layer, FACTORS, tensors["adapter_down"], tensors["adapter_up"])
    if "lora_A.weight" in tensors and "lora_B.weight" in tensors:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return of_product(layer, UPDATE, a, _peft_scale(adapter, layer, a.shape[0]) * b)
    if {"lora_A", "lora_B", "lora_E"} <= tensors.keys():
        gamma = float(adapter.described.get("lora_alpha") or 1) / float(adapter.described.get("init_r") or 1)
        return of_product(layer, UPDATE, tensors["lora_A"] * tensors["lora_E"], gamma * tensors["lora_B"])
    if "ia3_l" in tensors:
        return of_values(layer, SCALING, [tensors["ia3_l"].float() - 1])
    # What a method of PEFT does to W is told by the layer's shape too; parts on norms and biases are none of PEFT's.
    return of_values(layer, VALUES if adapter.described.get("peft_type") else SHIFT, list(tensors.values()))


def _of_experts(layer: str, moved: list[Movement]) -> Movement:
    """Of a stack: the norm over all experts as one, the largest of any, the mean of their effective ranks."""
    ranks = [m.effective_rank for m in moved if m.effective_rank is not None]
    return replace(
        moved[0],
        norm=math.hypot(*(m.norm for m in moved)),
        largest=max(m.largest for m in moved),
        effective_rank=sum(ranks) / len(ranks) if ranks else None,
    )


def of_product(layer: str, kind: str, a: Tensor, b: Tensor) -> Movement:
    """Of `B A` with `A (r, d_in)`, `B (d_out, r)`."""
    return _of_spectrum(layer, kind, singular_values(a, b))


def of_rotation(layer: str, turn: Tensor) -> Movement:
    """Of the blocks of `R - I`: a direction that R turns by θ moves by 2 sin(θ/2), a singular value."""
    moved = _of_spectrum(layer, ROTATION, torch.linalg.svdvals(turn.float()).flatten())
    return replace(moved, angle=math.degrees(2 * math.asin(min(1.0, moved.largest / 2))))


def of_values(layer: str, kind: str, values: list[Tensor]) -> Movement:
    """Of vectors, taken as one."""
    flat = torch.cat([v.detach().float().flatten() for v in values])
    return Movement(layer, kind, float(flat.norm()), float(flat.abs().max()))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Of `B A`, descending, float32 `(min(r, d_in, d_out),)`: with `Aᵀ = Q₁ R₁` and `B = Q₂ R₂` they are those of `R₂ R₁ᵀ`."""
    right, left = (torch.linalg.qr(t.float(), mode="r").R for t in (a.t(), b))
    return torch.linalg.svdvals(left @ right.t())


def effective_rank(singular: Tensor) -> float:
    """`exp(-Σ p log p)` with `p = σ / Σ σ`: n for n equal singular values, 1 for a single one, 0 for none."""
    total = singular.double().sum()
    if total == 0:
        return 0.0
    shares = singular.double() / total
    return float(torch.special.entr(shares).sum().exp())


def _between_orthonormal(part: SubspacePart) -> Tensor | None:
    """The core of an update `U C Vᵀ` between singular vectors: its singular values are the update's own. With the whole
    spectrum, factors are larger than W, and a decomposition of them is not to be made for a look."""
    if isinstance(part, SpectralLinear) and type(part).update is SpectralLinear.update:
        return part.core().float()
    return None


def _of_spectrum(layer: str, kind: str, singular: Tensor) -> Movement:
    largest = float(singular.max()) if singular.numel() else 0.0
    return Movement(layer, kind, float(singular.norm()), largest, effective_rank(singular), singular.numel())


def _layers_of_peft(adapter: AdapterFolder) -> list[str]:
    """The layers of an adapter that PEFT wrote, by the endings of its names; virtual tokens are one."""
    if EMBEDDINGS in adapter.keys:
        return [EMBEDDINGS]
    endings = {f".{suffix}" for words in peft_words() for suffix in words.suffixes}
    layers: dict[str, None] = {}
    for key in adapter.keys:
        for ending in endings:
            if key.endswith(ending):
                layers[key.removeprefix(PREFIX).removesuffix(ending)] = None
    return list(layers)


def _peft_scale(adapter: AdapterFolder, layer: str, rank: int) -> float:
    """γ of a layer with this rank, which has an alpha of its own where PEFT's pattern names it."""
    described = adapter.described
    alpha = float(by_pattern(described.get("alpha_pattern"), described.get("lora_alpha"), [layer])[layer] or 1)
    return alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
