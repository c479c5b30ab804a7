"""What PEFT can say of a method it does not know: an exact LoRA, an exact scaling, or a LoRA that comes near. Local."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.subspace import AddsBias, LowRankForm, ScalesBias, ScalingForm, SubspaceLinear, SubspacePart

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)
Lora = tuple[Pair, float, float]  # and the squared Frobenius norms of what it lacks of ΔW, and of ΔW


@dataclass(frozen=True)
class Forms:
    """Of one layer; None for what is not exact. Pairs are not held: those of a full spectrum are larger than the layer.

    shape: `(d_out, d_in)`; numbers: how many an exact LoRA has, `ΔW = B A` without terms that are zero; input_scale `(d_in)`,
    output_scale `(d_out)`: the one vector that scales the layer, bias included where the output is scaled, on the CPU in
    float32.
    """

    shape: tuple[int, int]
    numbers: int | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None

    @property
    def scaled(self) -> bool:
        return self.input_scale is not None or self.output_scale is not None


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
    pair = part.low_rank_form() if isinstance(part, LowRankForm) else None
    numbers = None if pair is None or _changes_bias(part, biased) else int(_terms(pair).sum()) * sum(shape)
    form = Forms(shape, numbers, *_scales(part, biased))
    if rank is not None and numbers is None and not form.scaled:
        _check_near(name, part, biased, rank, base)
    return form


@torch.no_grad()
def lora_of(name: str, part: SubspaceLinear, form: Forms, rank: int | None) -> Lora:
    """The LoRA of a part whose parameters are whole (its base too, where no LoRA is exact), on the CPU in float32.

    Arguments:
        rank: what its update is cut to; None for the exact one.

    Raises:
        UsageError: what is trained is no matrix.
    """
    if form.numbers is None and form.scaled:
        raise UsageError(f"approximate_rank is for layers whose update is a matrix, and {name} is scaled")
    pair = None if form.numbers is None or not isinstance(part, LowRankForm) else part.low_rank_form()
    if pair is None:
        weight = part.base.dense(torch.float32)
        update = part.merged(weight) - weight
    else:
        pair = compact((_plain(pair[0]), _plain(pair[1])))
        if rank is None:
            return pair, 0.0, 0.0
        update = pair[1] @ pair[0]
    near, lost, size = cut(update, rank or min(form.shape))
    return compact(near), lost, size


def compact(pair: Pair) -> Pair:
    """Without the terms that are zero (triplets that a schedule took away); at least one stays."""
    kept = _terms(pair)
    return pair[0][kept].contiguous(), pair[1][:, kept].contiguous()


def _terms(pair: Pair) -> Tensor:
    kept = (pair[0].abs().amax(1) > 0) & (pair[1].abs().amax(0) > 0)
    if not bool(kept.any()):
        kept[0] = True
    return kept


def pays(forms: Iterable[Forms]) -> bool:
    """Whether the factors are smaller than the matrices that they change."""
    return sum((form.numbers or 0) - form.shape[0] * form.shape[1] for form in forms) < 0


def cut(update: Tensor, rank: int) -> Lora:
    """The nearest LoRA of a rank to `ΔW (d_out, d_in)`, each factor with the root of the singular values, and the squared
    Frobenius norms of what is missing and of ΔW."""
    u, s, v = torch.linalg.svd(update.float(), full_matrices=False)
    root = s[:rank].sqrt()
    pair = (_plain(root[:, None] * v[:rank]), _plain(u[:, :rank] * root))
    return pair, float(s[rank:].double().square().sum()), float(s.double().square().sum())


def _check_near(name: str, part: SubspaceLinear, biased: bool, rank: int, base: bool) -> None:
    if not base:
        raise UsageError(
            f"approximate_rank is {rank}, but what method {part.info.name} adds to {name} is told by its base alone; accepted: "
            "a model (load_adapter on the base) in the place of the folder"
        )
    if _changes_bias(part, biased):
        raise UsageError(
            f"approximate_rank is {rank}, but method {part.info.name} changes biases, which a LoRA does not hold; accepted: merge"
        )


def _changes_bias(part: SubspaceLinear, biased: bool) -> bool:
    ones = torch.ones(part.out_features)
    return isinstance(part, AddsBias) or (biased and not torch.equal(_scaled_ones(part), ones))


def _scales(part: SubspaceLinear, biased: bool) -> tuple[Tensor | None, Tensor | None]:
    """The one vector that scales the layer's input, or its output and bias as PEFT's IA3 does; Nones where it is not one."""
    if not isinstance(part, ScalingForm) or isinstance(part, AddsBias):
        return None, None
    inputs, outputs = part.scaling_form()
    if inputs is not None and outputs is not None:
        return None, None
    scaled = _scaled_ones(part) if biased else None
    if inputs is not None:
        return (_plain(inputs), None) if scaled is None or bool((scaled == 1).all()) else (None, None)
    outputs = torch.ones(part.out_features) if outputs is None else _plain(outputs)
    return (None, outputs) if scaled is None or torch.equal(scaled, outputs) else (None, None)


def _scaled_ones(part: SubspaceLinear) -> Tensor:
    """What the method makes of a bias of ones: what it scales a bias by, `(d_out,)` float32 on the CPU."""
    ones = torch.ones(part.out_features, device=_device(part))
    return (part.scaled_bias(ones) if isinstance(part, ScalesBias) else ones).float().cpu()


def _device(part: SubspaceLinear) -> torch.device:
    return next((p.device for p in part.trainables().values()), torch.device("cpu"))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
