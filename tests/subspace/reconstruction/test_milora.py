"""MiLoRA against its golden numbers."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import W, X, layer

TAKEN = torch.tensor(
    [
        [1.5507182638, -0.2107945542, 0.4481314815, -0.4551166312],
        [0.3940311604, -0.053562033, 0.1138683743, -0.1156432722],
        [-0.3896341038, 0.0529643257, -0.1125976989, 0.1143527905],
    ]
)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_pair_starts_at_the_golden_smallest_triplet(alpha: float, transposed: bool) -> None:
    part = layer("milora", rank=1, alpha=alpha, transposed=transposed)
    torch.testing.assert_close(part.scale * part.lora_B.data @ part.lora_A.data, TAKEN)
    torch.testing.assert_close(part.lora_A.norm(), part.lora_B.norm())
    folded = layer("milora", rank=1, alpha=alpha, transposed=transposed, options={"residual": "fold"})
    torch.testing.assert_close(folded.base.dense(), W - TAKEN)
    torch.testing.assert_close(folded(X), X @ W.t())


def test_fourteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("milora", rank=2).trainables().values()) == 14


def test_the_smallest_triplets_have_no_randomised_shortcut() -> None:
    with pytest.raises(UsageError, match=r"subspace.options.svd is 'randomized'; accepted: exact"):
        resolve(SubspaceConfig(method="milora", options={"svd": "randomized"}))
