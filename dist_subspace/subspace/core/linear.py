"""A method on a linear operator, which is most of them: `y = W'(x) + b`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.linear_map import product_type
from dist_subspace.subspace.core.operator import Operator
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.unread_weight import weight_under_a_method


class SubspaceLinear(SubspacePart):
    """A frozen operator and its trained part: `y = W'(x) + b`.

    The operator is called as a module (`self.base(x)`), because a sharding engine gathers its bytes in module hooks, and
    once a forward where the maths allows it. Its bias moves here: methods disagree about what may scale it.
    """

    bias: nn.Parameter | None

    def __init__(self, base: Operator, settings: Settings) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.settings = settings
        self.enabled = True
        self.register_parameter("bias", base.bias)
        base.bias = None

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        assert isinstance(site, Operator)
        part = cls(site, settings)
        part.create(settings, generator)
        return part

    # What a method provides.

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        """Make the parameters, float32."""
        raise NotImplementedError

    def transform(self, x: Tensor) -> Tensor:
        """`W' x` without the bias; x is `(..., in_features)`."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """`W'` from the dense `W`, both float32 `(out_features, in_features)` on one device; parameters are whole."""
        raise UsageError(f"method {self.info.name} cannot be merged: its update is no matrix")

    # What bias.py and statistic.py change.

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of the merged layer from its frozen one, float32 on one device (None: it has none); parameters are whole."""
        return bias

    def with_bias(self, y: Tensor) -> Tensor:
        """`y + b`."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def untransformed(self, x: Tensor) -> Tensor:
        """`W x` without the bias, for the matrix that the model had before the method came: what a disabled layer computes."""
        return self.base(x)

    # What everyone uses.

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.enabled:
            return self.with_bias(self.transformed(x))
        y = self.untransformed(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def transformed(self, x: Tensor) -> Tensor:
        """`transform` in the type that products run in: on a CPU without 16-bit products, all of a layer's in float32."""
        wide = product_type(x)
        if wide == x.dtype:
            return self.transform(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.transform(x.to(wide)).to(x.dtype)

    @property
    def weight(self) -> Tensor | None:
        """What a model may ask about the frozen weight: its type (T5: `wo.weight.dtype`), shape, device. Reading is refused."""
        held = getattr(self.base, "weight", None)
        shape = (self.out_features, self.in_features)
        return None if held is None else weight_under_a_method(held, shape, self.name, self.info.name)

    def extra_repr(self) -> str:
        return (
            f"method={self.info.name}, rank={self.settings.rank}" if self.info.uses_rank else f"method={self.info.name}"
        )
