"""OLoRA against its golden numbers, and against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import W, X, layer, settled

TAKEN = torch.tensor([[2.0, -0.8, -0.4, 2.4], [0, 0, 0, 0], [1, -0.4, -0.2, 1.2]])


@pytest.mark.parametrize("transposed", [False, True])
def test_the_pair_starts_at_the_golden_head_of_the_decomposition(transposed: bool) -> None:
    part = layer("olora", rank=1, alpha=1.0, transposed=transposed)
    torch.testing.assert_close(part.lora_B.data @ part.lora_A.data, TAKEN)
    folded = layer("olora", rank=1, alpha=1.0, transposed=transposed, options={"residual": "fold"})
    torch.testing.assert_close(folded.base.dense(), W - TAKEN)


def test_the_factors_are_the_literal_ones_whatever_the_scale() -> None:
    part = layer("olora", rank=2, alpha=6.0)
    torch.testing.assert_close(part.lora_B.t() @ part.lora_B, torch.eye(2))
    assert part.lora_A[1, 0].abs() < 1e-6  # upper triangular
    folded = layer("olora", rank=2, alpha=6.0, options={"residual": "fold"})
    torch.testing.assert_close(folded.base.dense(), W - 3 * part.lora_B.data @ part.lora_A.data)
    torch.testing.assert_close(folded(X), X @ W.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)], ids=str)
def test_it_starts_and_trains_as_pefts(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    theirs[0].weight.data.copy_(matrix)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="olora")
    wrapped = peft.get_peft_model(theirs, config).base_model.model[0]
    resolved = resolve(SubspaceConfig(method="olora", rank=3, alpha=6.0))
    ours = settled(resolved.method.build(pack(matrix, "fp32"), resolved.settings, torch.Generator(), None))
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    torch.testing.assert_close(ours.lora_A.data, a.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lora_B.data, b.data, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for own, other in ((ours.lora_A, a), (ours.lora_B, b)):
            own.add_(0.1)
            other.copy_(own)
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(ours(x), wrapped(x), rtol=1e-4, atol=1e-5)


def test_it_has_no_rounds_to_make() -> None:
    with pytest.raises(UsageError, match="iterations"):
        resolve(SubspaceConfig(method="olora", options={"iterations": 2}))
