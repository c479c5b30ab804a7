"""What methods train of a norm: a scale and a shift of its output, beside the frozen norm itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.norms import stated_width
from dist_subspace.subspace.blocks.scaling import Scale
from dist_subspace.subspace.core.merging import MergesIntoNorm
from dist_subspace.subspace.core.spec import Settings


class NormPart(MergesIntoNorm):
    """`y = (1 + δ_s) ⊙ norm(x) + δ_b`, both zero at the start; a subclass says which of the two it has.

    With frozen weight w and bias b that is a norm with `w (1 + δ_s)` and `b (1 + δ_s) + δ_b`: all that training w and b could
    reach. The norm is called as a module, so that a sharding engine gathers it. Other attributes are the norm's own (models
    read `weight`, `eps`, `variance_epsilon`).
    """

    norm_scale: nn.Parameter | None
    norm_shift: nn.Parameter | None

    def __init__(self, norm: nn.Module, settings: Settings, width: int, *, scaled: bool, shifted: bool) -> None:
        super().__init__()
        self.base = norm
        self.settings = settings
        self.enabled = True
        self.register_parameter("norm_scale", nn.Parameter(torch.zeros(width)) if scaled else None)
        self.register_parameter("norm_shift", nn.Parameter(torch.zeros(width)) if shifted else None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        if not self.enabled:
            return y
        if self.norm_scale is not None:
            y = Scale.apply(y, self.norm_scale)
        return y if self.norm_shift is None else y + self.norm_shift.to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """The norm's weight, float32."""
        return weight if self.norm_scale is None else weight * (1 + self.norm_scale.float())

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is not None and self.norm_scale is not None:
            bias = bias * (1 + self.norm_scale.float())
        if self.norm_shift is None:
            return bias
        return self.norm_shift.float() if bias is None else bias + self.norm_shift.float()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def extra_repr(self) -> str:
        return f"method={self.info.name}"


def norm_width(norm: nn.Module) -> int:
    """How many features a norm has: as it says, else as its weight has, which must be whole (`attach` gathers it).

    Raises:
        UsageError: where neither tells.
    """
    width = stated_width(norm)
    if width is not None:
        return width
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if not weight.numel():
        raise UsageError(f"the width of a {type(norm).__name__} is not known while its weight is split over the ranks")
    return int(weight.shape[-1])
