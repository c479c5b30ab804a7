"""What float16 cannot hold is found in any pieces alike, and said alike by ranks that see different pieces."""

from __future__ import annotations

import pickle

import pytest
import torch

from dist_subspace.loading.float16 import Float16Range, TooLarge, earliest

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([1.0, -70144.0, 3.0], 70144.0),
        ([INF, 70144.0], 70144.0),  # the infinite one is as it was; the other would become so
        ([NAN, -70144.0, -INF], 70144.0),
        ([NAN, 2.0], 2.0),
        ([0.0, 65504.0], 65504.0),
    ],
    ids=str,
)
def test_the_largest_finite_magnitude_is_the_same_in_any_pieces(
    values: list[float], largest: float, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and largest == 65504.0:
        largest = 65536.0
    tensor = torch.tensor(values, dtype=dtype)
    whole, pieces = Float16Range(torch.float16), Float16Range(torch.float16)
    assert whole(tensor) is tensor
    for piece in tensor.split(1):
        pieces(piece)
    assert whole.largest == pieces.largest == largest
    assert whole.overflows == (largest > 65504)


def test_other_types_hold_whatever_there_is() -> None:
    for dtype, of in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        watch = Float16Range(dtype)
        watch(torch.tensor([1e30, INF]).to(of))
        assert not watch.overflows
    watch = Float16Range(torch.float16)
    watch(torch.empty(0))
    assert not watch.overflows


def test_ranks_say_the_first_weight_and_its_largest_value() -> None:
    late, small, large = (
        TooLarge("folder", name, value, number)
        for name, value, number in (("z", 9e9, 7), ("a", 70000.0, 3), ("a", 80000.0, 3))
    )
    assert earliest([None, late, small, large]) is large
    assert earliest([None, None]) is None
    assert str(pickle.loads(pickle.dumps(large))) == str(large)
    assert "whose a has values up to 80,000, which float16 cannot hold" in str(large)
