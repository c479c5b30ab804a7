"""Our 4-bit quantiser for CPUs gives bitsandbytes' bytes: for every type, every bound, odd ends, and what is no number."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as reference
from torch import Tensor

from dist_subspace.storage import bnb
from dist_subspace.storage.four_bit_cpu import quantize_blocks

each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def values_of(kind: str) -> Tensor:
    return reference.get_4bit_type(kind, device="cpu")


def assert_same(flat: Tensor, kind: str, blocksize: int = 64) -> None:
    codes, state = reference.quantize_4bit(flat, blocksize=blocksize, quant_type=kind)
    ours, absmax = quantize_blocks(flat, tuple(values_of(kind).tolist()), blocksize)
    assert torch.equal(ours, codes.view(-1))
    torch.testing.assert_close(absmax, state.absmax, rtol=0, atol=0, equal_nan=True)


@each_kind
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_random_entries_of_any_number(dtype: torch.dtype, blocksize: int, kind: str) -> None:
    for numel in (1, 2, 63, 64, 65, 127, 4096, 200_001):
        assert_same(torch.randn(numel).to(dtype), kind, blocksize)


@each_kind
def test_every_pattern_of_16_bits(kind: str) -> None:
    """Infinite ones and those that are no number among them, and without them."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)[torch.randperm(1 << 16)].to(torch.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        whole = patterns.view(dtype)
        assert_same(whole, kind)
        assert_same(whole.nan_to_num(0.0, 0.0, 0.0), kind)
        assert_same(torch.sort(whole.nan_to_num(0.0, 0.0, 0.0).float()).values, kind)


@each_kind
def test_entries_at_the_bounds_and_next_to_them(kind: str) -> None:
    ordered = values_of(kind).sort().values
    bounds = (ordered[:-1] + ordered[1:]) / 2
    near = torch.cat([torch.nextafter(bounds, torch.tensor(side)) for side in (-2.0, 2.0)])
    block = torch.cat([bounds, near, torch.tensor([1.0, -1.0, 0.0, -0.0])])
    assert_same(torch.nn.functional.pad(block, (0, 64 - block.numel())), kind)  # the scale is exactly one


@each_kind
def test_zeros_and_the_smallest_numbers(kind: str) -> None:
    for value in (0.0, -0.0, 1e-45, 1e-39, 1e-38, 2e-38):
        for numel in (64, 70, 1):
            assert_same(torch.full((numel,), value), kind)


def test_bounds_too_near_to_one_another_are_no_table_of_ours() -> None:
    values = [number / 1e6 for number in range(16)]
    with pytest.raises(ValueError, match="lie in one of 4096 cells"):
        quantize_blocks(torch.ones(64), tuple(values), 64)


def test_a_bitsandbytes_that_rounds_otherwise_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(640)
    expected = bnb.quantize_4bit_blocks(flat, "nf4")
    monkeypatch.setattr(bnb, "quantize_blocks", lambda *_: (torch.zeros(320, dtype=torch.uint8), torch.zeros(10)))
    bnb._same_on_cpu.cache_clear()
    try:
        again = bnb.quantize_4bit_blocks(flat, "nf4")
    finally:
        bnb._same_on_cpu.cache_clear()
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
