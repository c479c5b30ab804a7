"""SAM-PARSER against its golden numbers, its form in files, and `top_k`."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import BIAS, SIGMA, VT, U, X, layer

GOLDEN = torch.tensor([[0.3018986321, 4.5458185188, 4.6648788099]])
VALUES = torch.tensor([6.0, 3, 1])


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    part = layer("sam-parser", transposed=transposed, bias=True)
    part.load_file_tensors({"sam_parser_sigma": VALUES})
    torch.testing.assert_close(part(X), GOLDEN + BIAS)


def test_the_spectrum_starts_at_the_frozen_one_and_files_hold_it() -> None:
    part = layer("sam-parser")
    assert not part.sam_parser_sigma.any()
    torch.testing.assert_close(part.file_tensors()["sam_parser_sigma"].double(), SIGMA, rtol=1e-6, atol=0)
    part.load_file_tensors({"sam_parser_sigma": VALUES})
    torch.testing.assert_close(part.file_tensors()["sam_parser_sigma"], VALUES)
    torch.testing.assert_close(part.sam_parser_sigma.data, (VALUES - SIGMA).float())


def test_left_right_and_two_sided_forms_agree() -> None:
    """docs/methods.md, "Product forms of a changed spectrum": the one-sided ones need one half of the vectors."""
    part = layer("sam-parser")
    part.load_file_tensors({"sam_parser_sigma": VALUES})
    shift = (VALUES - SIGMA) / SIGMA
    x = X.double()
    matrix = (U * SIGMA) @ VT
    z = x @ matrix.t()
    left = z + shift * (z @ U) @ U.t()
    right = (x + shift * (x @ VT.t()) @ VT) @ matrix.t()
    torch.testing.assert_close(left.float(), part(X))
    torch.testing.assert_close(right.float(), part(X))


def test_a_singular_value_may_become_negative() -> None:
    part = layer("sam-parser")
    part.load_file_tensors({"sam_parser_sigma": torch.tensor([-1.0, 3, 1])})
    found = torch.linalg.svdvals(part.merged(part.base.dense()).detach())
    torch.testing.assert_close(found, torch.tensor([3.0, 1, 1]))


def test_top_k_trains_the_largest_alone() -> None:
    part = layer("sam-parser", options={"top_k": 2})
    assert part.setup_statistic == "top-k SVD" and part.sam_parser_sigma.shape == (2,)
    assert part.spectral_U.matrix.shape == (3, 2) and part.spectral_V.matrix.shape == (2, 4)
    part.load_file_tensors({"sam_parser_sigma": VALUES[:2]})
    wanted = X.double() @ ((U * torch.tensor([6.0, 3, SIGMA[2]])) @ VT).t()
    torch.testing.assert_close(part(X), wanted.float())
    a, b = part.low_rank_form()
    assert a.shape[0] == b.shape[1] == 2


def test_top_k_beyond_what_there_is_means_all() -> None:
    part = layer("sam-parser", options={"top_k": 100})
    assert part.sam_parser_sigma.shape == (3,)
    assert sum(p.numel() for p in layer("sam-parser").trainables().values()) == 3


@pytest.mark.parametrize("constraint", ["mpc_o", "mpc_d", "mpc_n"])
def test_constraints_are_refused_with_the_reason(constraint: str) -> None:
    for method in ("sam-parser", "svdiff", "spectral-additive", "spectral-rotational"):
        with pytest.raises(UsageError, match=f"'{constraint}', which method {method} cannot have: .*singular vectors"):
            resolve(SubspaceConfig(method=method, constraint=constraint))


def test_zero_or_a_fraction_is_no_number_of_triplets() -> None:
    for value in (0, 1.5, True):
        with pytest.raises(UsageError, match="top_k"):
            resolve(SubspaceConfig(method="sam-parser", options={"top_k": value}))
