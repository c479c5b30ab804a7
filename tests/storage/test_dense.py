"""A frozen matrix in floating point: the layer's own bytes in the layer's own layout, and the types that it may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_subspace.errors import UsageError
from dist_subspace.storage import pack, storage_info
from dist_subspace.storage.dense import DenseLinear, adopt_plain

MATRIX = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: Conv1D(3, 4)])
def test_an_adopted_layer_keeps_its_parameters_and_computes_the_same(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    x = torch.randn(2, 4)
    expected = layer(x)
    operator = adopt_plain(layer)
    assert operator.weight is layer.weight and operator.bias is layer.bias
    assert operator.shape == (3, 4) and operator.storage == "fp32" and operator.is_float
    torch.testing.assert_close(operator(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("storage", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_matrix_is_held_in_its_layout_and_shown_as_out_times_in(
    storage: str, dtype: torch.dtype, transposed: bool
) -> None:
    held = MATRIX.t().contiguous() if transposed else MATRIX
    operator = pack(held, storage, transposed=transposed)
    assert isinstance(operator, DenseLinear) and operator.storage == storage
    assert operator.weight.dtype == dtype and operator.weight.shape == held.shape
    torch.testing.assert_close(operator.dense(torch.float32), MATRIX)
    info = storage_info(storage)
    assert info.bytes_held(3, 4) == operator.weight.numel() * operator.weight.element_size()
    assert info.bits == 8 * operator.weight.element_size()


@pytest.mark.parametrize("transposed", [False, True])
def test_another_matrix_is_held_as_this_one_is(transposed: bool) -> None:
    operator = pack(MATRIX.t().contiguous() if transposed else MATRIX, "bf16", transposed=transposed)
    again = operator.repacked(MATRIX + 1)
    assert again.weight.shape == operator.weight.shape and again.weight.is_contiguous()
    assert again.storage == "bf16" and again.conv1d == operator.conv1d
    torch.testing.assert_close(again.dense(torch.float32), MATRIX + 1)


def test_a_type_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"weight is torch\.float64; accepted: torch\.float32, torch\.bfloat16, torch"):
        adopt_plain(nn.Linear(4, 3, dtype=torch.float64))
