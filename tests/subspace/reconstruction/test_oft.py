"""OFT against rotations worked out by hand, and against PEFT's own layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer
from torch import nn

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from dist_subspace.subspace.reconstruction.oft import divisor_near
from tests.subspace.golden import W, X, give, layer
from tests.subspace.peft_reference import One, file_of

HALF = torch.tensor([[0.5], [0.0]])  # Q = [0 0.5 ; -0.5 0] in the first block of two inputs, none in the second
# x = [1 2 -1 0.5]. With five terms Rᵀ = (1 - q²)² I + 2 (1 - q²) Q: the first two become [1 2] [0.5625 0.75 ; -0.75 0.5625].
# One block for all turns [-1 0.5] too, into [-0.9375 -0.46875].
# Solved, Rᵀ = ((1 - q²) I - 2 Q) / (1 + q²) = [0.6 -0.8 ; 0.8 0.6], which turns the other way: [2.2 0.4]. With two, I + 2 Q.
GOLDEN: dict[str, tuple[dict[str, Any], torch.Tensor, list[float]]] = {
    "five terms": ({}, HALF, [-3.25, 3.625, 2.0625]),
    "solved": ({"cayley": "exact"}, HALF, [4.5, -0.8, 5.2]),
    "two terms": ({"neumann_terms": 2}, HALF, [-4.5, 7, 2]),
    "one block for all": ({"block_share": True}, HALF[:1], [-4.21875, 5.625, -1.875]),
}


def rotated(**options: Any) -> Any:
    return layer("oft", options={"oft_block_size": 2, **options})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", GOLDEN)
def test_forward_and_merge_are_the_golden_ones(case: str, transposed: bool) -> None:
    options, above, expected = GOLDEN[case]
    part = layer("oft", transposed=transposed, options={"oft_block_size": 2, **options})
    give(part, oft_R=above)
    torch.testing.assert_close(part(X), torch.tensor([expected]))
    torch.testing.assert_close(X @ part.merged(W).t(), torch.tensor([expected]))


@pytest.mark.parametrize("terms", [4, 5, 6, 9])
def test_the_series_is_that_of_cayleys_inverse(terms: int) -> None:
    """`(I + Q)(I + Q + … + Q^(k-2))`, in float64; what it lacks of a rotation is of the order of Q^k."""
    part = layer("oft", options={"neumann_terms": terms})
    above = 0.2 * torch.randn(1, 6)
    give(part, oft_R=above)
    q = np.zeros((4, 4))
    q[np.triu_indices(4, 1)] = above[0].double().numpy()
    q -= q.T
    series = (np.eye(4) + q) @ sum(np.linalg.matrix_power(q, n) for n in range(terms - 1))
    found = np.eye(4) + part.rotation()[0].detach().double().numpy()
    np.testing.assert_allclose(found, series, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        series, (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q), atol=3 * np.linalg.norm(q, 2) ** (terms - 1)
    )


def test_solved_it_is_a_rotation_however_large() -> None:
    part = give(layer("oft", options={"cayley": "exact"}), oft_R=3 * torch.randn(1, 6))
    r = torch.eye(4) + part.rotation()[0]
    torch.testing.assert_close(r.t() @ r, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(r), torch.tensor(1.0))
    torch.testing.assert_close(torch.linalg.svdvals(part.merged(W)), torch.linalg.svdvals(W), rtol=1e-4, atol=1e-4)


SERIES = {
    "five terms": {},
    "two terms": {"neumann_terms": 2},
    "three terms": {"neumann_terms": 3},
    "four terms": {"neumann_terms": 4},
    "eight terms": {"neumann_terms": 8},
    "solved": {"cayley": "exact"},
}


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("case", SERIES)
@pytest.mark.parametrize(("size", "shared"), [(4, False), (4, True), (5, False), (64, False)])
def test_pefts_layer_computes_and_merges_the_same(case: str, size: int, shared: bool) -> None:
    weight, bias, x = torch.randn(6, 12), torch.randn(6), torch.randn(2, 3, 12)
    options = {"oft_block_size": size, "block_share": shared, **SERIES[case]}
    resolved = resolve(SubspaceConfig("oft", options=options))
    part: Any = resolved.method.build(pack(weight, "fp32", bias=bias), resolved.settings, torch.Generator(), None)
    part.oft_R.data.normal_(std=0.3)
    config = peft.get_peft_config({"peft_type": "OFT", "target_modules": ["proj"], **part.peft.entries(part.settings)})
    model = peft.get_peft_model(One(weight, bias, False), config)
    assert not peft.set_peft_model_state_dict(model, file_of(part.file_tensors())).unexpected_keys
    torch.testing.assert_close(part(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.merged(weight), model.merge_and_unload().proj.weight, rtol=1e-4, atol=1e-4)


def test_a_block_size_that_does_not_fit_is_the_one_that_peft_takes() -> None:
    for inputs in range(1, 50):
        for size in range(2, 60):
            fits = inputs % size == 0
            theirs = size if fits else OFTLayer.adjust_oft_parameters(None, inputs, size)
            assert divisor_near(size, inputs) == theirs, (size, inputs)


def test_nothing_is_turned_at_the_start_and_each_block_has_its_own_angles() -> None:
    part = rotated()
    assert {name: tuple(p.shape) for name, p in part.trainables().items()} == {"oft_R": (2, 1)}
    assert torch.equal(part(X), part.base(X)) and not part.rotation().any()
    assert rotated(block_share=True).oft_R.shape == (1, 1)


def test_a_small_rotation_is_not_lost_in_16_bits() -> None:
    """R - I is computed, not R: in bfloat16 the step from 1 is 2^-8."""
    part = give(rotated(), oft_R=1e-3 * HALF).to(torch.bfloat16)
    exact = give(rotated(), oft_R=part.oft_R.float())
    assert part.rotation().dtype == torch.float32
    torch.testing.assert_close(part.rotation(), exact.rotation(), rtol=1e-5, atol=0)


def test_inputs_that_have_no_blocks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(509, 3))
    with pytest.raises(UsageError, match=r"oft_block_size is 32, but a target has 509 inputs, and no divisor of them"):
        dsub.attach(model, SubspaceConfig("oft", target_modules=["0"]))
