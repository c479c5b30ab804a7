"""What the quantised storages share: their `weight` is no matrix, and must never be taken for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_subspace.storage.operator import FrozenLinear
from dist_subspace.unread_weight import unread_weight


class PackedLinear(FrozenLinear):
    """The parameter `codes` holds the packed bytes. Who asks the layer for `weight` is shown the type of the computation and the
    logical shape, and is refused its values (UsageError).

    name: the layer's name in its model, for messages.
    compute_dtype: the type that the model computes in, which models cast their activations to by asking `weight.dtype`.
    """

    codes: nn.Parameter
    matrix_name = "codes"
    name: str = ""
    compute_dtype: torch.dtype = torch.float32

    @property
    def weight(self) -> Tensor:
        return unread_weight(
            self.codes, self.shape, self.compute_dtype, _REASON.format(self.name or "a layer", self.storage)
        )


_REASON = (
    "the model reads the weight of {}, which is held as {}, and would find packed bytes; accepted for this model: a storage of "
    "floats (bf16, fp16, fp32)"
)
