"""The fixture of the golden numbers, computed from the definitions by numpy in float64 (float32 is exact on them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_subspace.storage import pack
from dist_subspace.subspace import (
    FoldsIntoBase,
    SetupStatistic,
    SubspaceConfig,
    SubspaceLinear,
    SubspacePart,
    Weight,
    resolve,
)
from dist_subspace.subspace.core.operator import no_original

W = torch.tensor([[2.0, -1, 0, 1], [0, 3, 1, -2], [1, 0, -1, 4]])
BIAS = torch.tensor([0.1, -0.2, 0.3])
X = torch.tensor([[1.0, 2, -1, 0.5]])
X2 = torch.tensor([[-2.0, 1, 0, 0.5]])
S = torch.tensor([1.5, 0.5, 2, -1])
L = torch.tensor([2.0, -1, 0.5])
G = torch.tensor([[1.0, -2, 0.5]])
A = torch.tensor([[1.0, 0, -1, 2], [0, 1, 1, 0]])
B = torch.tensor([[1.0, 0], [0, 2], [-1, 1]])


def layer(method: str, *, bias: bool = False, transposed: bool = False, **config: Any) -> SubspaceLinear:
    """The fixture's matrix with a method on it, in float32, at the method's initial values."""
    resolved = resolve(SubspaceConfig(method=method, **config))
    weight = W.t().contiguous() if transposed else W
    base = pack(weight.clone(), "fp32", transposed=transposed, bias=BIAS.clone() if bias else None)
    return settled(resolved.method.build(base, resolved.settings, torch.Generator().manual_seed(0), None))


def settled(module: SubspacePart, original: Tensor | None = None) -> Any:
    """The part with its statistic made and taken, as attach does it, for one layer on one rank."""
    if not isinstance(module, SetupStatistic) or module.setup_statistic == "none":
        return module
    weight = opened(module, original)
    factors = module.decompose(weight)
    if isinstance(module, FoldsIntoBase) and module.rebases:
        module.base = module.base.repacked(module.rebased(factors, weight))
    module.set_factors(factors)
    return module


def opened(module: Any, original: Tensor | None = None) -> Weight:
    """The part's frozen matrix, laid open for a decomposition."""
    base = module.base
    quantised = None if base.is_float else lambda matrix: base.repacked(matrix).dense(torch.float32)
    generator = torch.Generator().manual_seed(0)
    return Weight(
        base.dense(torch.float32), no_original if original is None else lambda: original, quantised, generator
    )


def give(module: SubspaceLinear, **values: Tensor) -> SubspaceLinear:
    """The layer with the given trained values."""
    for name, value in values.items():
        module.get_parameter(name).data.copy_(value)
    return module


def golden_layer(method: str, **kwargs: Any) -> SubspaceLinear:
    """The layer at the fixture's own values."""
    if method == "lora":
        return give(layer("lora", **{"rank": 2, "alpha": 4.0, **kwargs}), lora_A=A, lora_B=B)
    if method == "ssl":
        return give(layer("ssl", **kwargs), ssl_s=S - 1)
    return give(layer("ssb", **kwargs), ssb_s=S - 1, ssb_l=L - 1)
