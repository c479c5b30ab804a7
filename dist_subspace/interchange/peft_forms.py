"""What PEFT can say of a method it does not know: an exact LoRA, an exact scaling, or a LoRA that comes near. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceLinear, SubspacePart

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)


@dataclass(frozen=True)
class Forms:
    """Of one layer, on the CPU in float32; None for what is not exact.

    lora: `(A, B)` with `ΔW = B A`; input_scale `(d_in)`, output_scale `(d_out)`: the one vector that scales the layer, bias
    included where the output is scaled; near: a LoRA cut to its rank, with the squared Frobenius norms of what is missing and
    of ΔW.
    """

    shape: tuple[int, int]
    lora: Pair | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    near: tuple[Pair, float, float] | None = None


@torch.no_grad()
def forms_of(name: str, part: SubspacePart, biased: bool, rank: int | None, base: bool) -> Forms | None:
    """The forms of a part whose parameters are whole; None for one that stands on no linear layer.

    Arguments:
        biased: whether the layer has a bias.
        rank: of an approximation, where nothing is exact; None for none.
        base: whether the base's weight is to be had.

    Raises:
        UsageError: an approximation is asked for, and there is no base, or what is trained is no matrix.
    """
    if not isinstance(part, SubspaceLinear):
        return None
    shape = (part.out_features, part.in_features)
    pair = part.low_rank_form()
    lora = None if pair is None or _changes_bias(part, biased) else (_plain(pair[0]), _plain(pair[1]))
    inputs, outputs = _scales(part, biased)
    if rank is None or lora is not None or inputs is not None or outputs is not None:
        return Forms(shape, lora, inputs, outputs)
    return Forms(shape, near=_near(name, part, biased, rank, base))


def compact(pair: Pair) -> Pair:
    """Without the terms that are zero (triplets that a schedule took away); at least one stays."""
    a, b = pair
    kept = (a.abs().amax(1) > 0) & (b.abs().amax(0) > 0)
    if not bool(kept.any()):
        kept[0] = True
    return a[kept].contiguous(), b[:, kept].contiguous()


def pays(pairs: Mapping[str, Pair]) -> bool:
    """Whether the factors are smaller than the matrices that they change."""
    factors = sum(a.numel() + b.numel() for a, b in pairs.values())
    return factors < sum(a.shape[1] * b.shape[0] for a, b in pairs.values())


def cut(update: Tensor, rank: int) -> tuple[Pair, float, float]:
    """The nearest LoRA of a rank to `ΔW (d_out, d_in)`, each factor with the root of the singular values, and the squared
    Frobenius norms of what is missing and of ΔW."""
    u, s, v = torch.linalg.svd(update.float(), full_matrices=False)
    root = s[:rank].sqrt()
    pair = (_plain(root[:, None] * v[:rank]), _plain(u[:, :rank] * root))
    return pair, float(s[rank:].double().square().sum()), float(s.double().square().sum())


def _near(name: str, part: SubspaceLinear, biased: bool, rank: int, base: bool) -> tuple[Pair, float, float]:
    if not base:
        raise UsageError(
            f"approximate_rank is {rank}, but what method {part.info.name} adds to {name} is told by its base alone; accepted: "
            "a model (load_adapter on the base) in the place of the folder"
        )
    if _changes_bias(part, biased):
        raise UsageError(
            f"approximate_rank is {rank}, but method {part.info.name} changes biases, which a LoRA does not hold; accepted: merge"
        )
    weight = part.base.dense(torch.float32)
    return cut(part.merged(weight) - weight, rank)


def _changes_bias(part: SubspaceLinear, biased: bool) -> bool:
    ones = torch.ones(part.out_features)
    shifted = biased and not torch.equal(part.shifted_bias(ones.to(_device(part))).float().cpu(), ones)
    return part.added_bias() is not None or shifted


def _scales(part: SubspaceLinear, biased: bool) -> tuple[Tensor | None, Tensor | None]:
    """The one vector that scales the layer's input, or its output and bias as PEFT's IA3 does; Nones where it is not one."""
    form = part.scaling_form()
    if form is None or part.added_bias() is not None or (form[0] is not None and form[1] is not None):
        return None, None
    inputs, outputs = form
    shifted = part.shifted_bias(torch.ones(part.out_features, device=_device(part))).float().cpu() if biased else None
    if inputs is not None:
        return (_plain(inputs), None) if shifted is None or bool((shifted == 1).all()) else (None, None)
    outputs = torch.ones(part.out_features) if outputs is None else _plain(outputs)
    return (None, outputs) if shifted is None or torch.equal(shifted, outputs) else (None, None)


def _device(part: SubspaceLinear) -> torch.device:
    return next((p.device for p in part.trainables().values()), torch.device("cpu"))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
