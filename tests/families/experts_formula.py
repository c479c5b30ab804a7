"""What a method makes of each expert of a stack, written once more in plain torch on whole dense matrices.

Nothing here calls the method: the tensors of a part go in, one behind the other for each expert, and `W'` comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dist_subspace.storage import FrozenStack
from dist_subspace.subspace import Settings, StackedPart

Own = Mapping[str, Tensor]
Formula = Callable[[Tensor, Own, Settings], Tensor]


def lora(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    return weight + settings.alpha / settings.rank * own["lora_B"] @ own["lora_A"]


def rslora(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    return weight + settings.alpha / settings.rank**0.5 * own["lora_B"] @ own["lora_A"]


def dora(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    """The norm is a constant in backward, and magnitudes are held from the rows' own norms on."""
    directions = lora(weight, own, settings)
    magnitudes = weight.norm(dim=-1) + own["lora_magnitude_vector"]
    return (magnitudes / directions.norm(dim=-1).detach())[..., None] * directions


def pissa(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    """The rest of W without its largest triplets, beside the pair that starts at them."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = settings.rank
    largest = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return weight - largest.to(weight) + settings.alpha / rank * own["lora_B"] @ own["lora_A"]


def ssl(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    return weight * (1 + own["ssl_s"])[..., None, :]


def ssb(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    return (1 + own["ssb_l"])[..., :, None] * weight * (1 + own["ssb_s"])[..., None, :]


def ia3(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    return (1 + own["ia3_l"])[..., :, None] * weight


def miss(weight: Tensor, own: Own, settings: Settings) -> Tensor:
    d_in = weight.shape[-1]
    block = own["miss_block"].transpose(-1, -2)
    return weight + torch.cat([block] * -(-d_in // settings.rank), dim=-1)[..., :d_in]


FORMULAS: dict[str, Formula] = {
    "lora": lora,
    "rslora": rslora,
    "pissa": pissa,
    "dora": dora,
    "ssl": ssl,
    "ssb": ssb,
    "ia3": ia3,
    "miss": miss,
}
# Options with which the formula is exact, and a rank that fits the smallest stack.
OPTIONS = {
    "lora": {"rank": 2, "alpha": 6.0},
    "rslora": {"rank": 2, "alpha": 6.0},
    "pissa": {"rank": 2, "alpha": 6.0, "options": {"svd": "exact"}},
    "dora": {"rank": 2, "alpha": 6.0},
    "miss": {"rank": 3},
}


def dense(stack: FrozenStack) -> Tensor:
    """`(experts, d_out, d_in)` float32, as the forward uses them."""
    return torch.stack([stack.expert(number).dense() for number in range(stack.experts)])


def randomise(model: nn.Module, size: float = 0.1) -> None:
    """Move every trained value, the same way each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def changed(part: StackedPart) -> tuple[Tensor, dict[str, Tensor]]:
    """`W' (experts, d_out, d_in)` of a part whose parameters are whole, and the leaves that it is a function of."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in part.trainables().items()}
    return FORMULAS[part.info.name](dense(part.base), leaves, part.settings), leaves
