"""A storage says what it holds, what it costs and which options it has; a new one is found by being there."""

from __future__ import annotations

import itertools

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.storage import options_for, pack, storage_info, storages

SHAPES = [(64, 64), (7, 9), (130, 257), (1, 3), (300, 128)]


@pytest.mark.parametrize("storage", sorted(storages()))
def test_a_matrix_takes_the_bytes_that_its_storage_says(storage: str) -> None:
    info = storage_info(storage)
    flags = [name for name, option in info.options.items() if isinstance(option.default, bool)]
    for shape, values in itertools.product(SHAPES, itertools.product((False, True), repeat=len(flags))):
        options = dict(zip(flags, values))
        held = pack(torch.randn(shape), storage, **options)
        taken = sum(p.numel() * p.element_size() for p in held.parameters())
        assert info.bytes_held(*shape, **info.checked(options)) == taken, (shape, options)
        assert sum(held.weights_in(name) for name, _ in held.named_parameters()) == shape[0] * shape[1]
        assert held.options() == info.checked(options)


def test_an_option_that_the_storage_does_not_have_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"model\.storage_options\.double_quant is no option of storage 'int8'; accepted: none"
    ):
        options_for("int8", True, {"double_quant": True})
    with pytest.raises(UsageError, match=r"model\.storage_options\.double_quant is 'yes'; accepted: True, False"):
        options_for("nf4", True, {"double_quant": "yes"})
    with pytest.raises(UsageError, match=r"model\.storage is 'nf5'; did you mean 'nf4'|accepted"):
        storage_info("nf5")


def test_the_older_name_reaches_the_storages_that_have_the_option() -> None:
    assert options_for("nf4", False) == {"double_quant": False}
    assert options_for("fp4", False, {"double_quant": True}) == {"double_quant": True}
    assert options_for("int8", True) == {}
