"""The fixture of the golden numbers, computed from the definitions by numpy in float64 (float32 is exact on them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace import methods
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
from dist_subspace.subspace.attach import attached
from dist_subspace.subspace.core.constraints import Constraint
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

# The singular value decomposition of W.
SIGMA = torch.tensor([5.2907835312, 2.6049283289, 1.7949813446], dtype=torch.float64)
U = torch.tensor(
    [
        [0.3346179805, -0.0356006817, 0.9416811555],
        [-0.5914495113, 0.7700219719, 0.2392773253],
        [0.7336336162, 0.6370233545, -0.2366071914],
    ],
    dtype=torch.float64,
)
VT = torch.tensor(
    [
        [0.2651534634, -0.398611378, -0.2504512081, 0.8414729957],
        [0.2172121148, 0.9004726047, 0.0510565362, 0.3733111509],
        [0.9174218576, -0.12470836, 0.2651194778, -0.2692519686],
    ],
    dtype=torch.float64,
)

# A bottleneck adapter's values, and what it adds to X by activation.
BOTTLENECK = {
    "adapter_down": torch.tensor([[1, -1, 0.5], [0, 0.5, -1]]),
    "adapter_down_bias": torch.tensor([2.0, 1]),
    "adapter_up": torch.tensor([[1.0, 0], [2, -1], [0, 1]]),
    "adapter_up_bias": torch.tensor([0.1, 0, -0.1]),
}
BOTTLENECK_GOLDEN = {"swish": [0.9112296656, 4.8914007526, 3.6310585786], "relu": [1.1, 5, 3.9]}

# A matrix to quantise, and LoftQ's error on it by rank after 0 to 4 rounds.
TOY = torch.tensor(
    [[torch.sin(torch.tensor((i + 1.0) * (j + 2)).double()) for j in range(12)] for i in range(8)], dtype=torch.float64
) + 3 * torch.outer(torch.cos(torch.arange(8).double()), torch.cos(torch.arange(12).double() / 2))
LOFTQ = {
    1: [0.9039132317, 0.8586190514, 0.8404916279, 0.8469576318, 0.8489992625],
    2: [0.6594928341, 0.6443820183, 0.6471589173, 0.6554551980, 0.6573470111],
}


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


def moved(part: SubspaceLinear, size: float = 0.1) -> SubspaceLinear:
    generator = torch.Generator().manual_seed(1)
    for parameter in part.trainables().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return part


def toy_quantiser(matrix: Tensor) -> Tensor:
    scale = matrix.abs().amax(1, keepdim=True) / 7
    return (matrix / scale).round() * scale


def config_of(method: str, rank: int) -> dict[str, Any]:
    config: dict[str, Any] = {"rank": rank} if methods()[method].uses_rank else {}
    if method == "adalora":
        config["options"] = {"init_rank": rank}
    if method == "flexlora":
        config["constraint"] = "none"  # its own looks at values, which these models have not
    return config


def dense_penalty(model: nn.Module, constraint: Constraint) -> Tensor:
    """λ (1/N) Σ over layers, as one differentiable formula."""
    total = torch.zeros(())
    parts = [model.get_submodule(name) for name in attached(model).layers]
    for part in parts:
        a, b = part.constrained_factors()
        if a is not None:
            total = total + (a @ a.t() - torch.eye(len(a))).square().sum()
        if b is not None:
            gram = b.t() @ b
            target = torch.diag(gram.diagonal()) if constraint.kind == "mpc_d" else torch.eye(len(gram))
            total = total + (gram - target).square().sum()
    return constraint.weight * total / len(parts)
