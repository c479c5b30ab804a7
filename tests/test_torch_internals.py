"""What is asked of torch below its public surface answers, and answers what the products themselves show."""

from __future__ import annotations

import torch

from dist_subspace.torch_internals import (
    cpu_multiplies,
    in_backward,
    reshaped,
    valueless_tensor,
    version,
    without_overrides,
)


def test_torch_says_which_types_its_cpu_products_have() -> None:
    assert cpu_multiplies(torch.float32) and cpu_multiplies(torch.float64)
    assert isinstance(cpu_multiplies(torch.bfloat16), bool) and isinstance(cpu_multiplies(torch.float16), bool)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not cpu_multiplies(torch.bfloat16)


def test_a_reshaped_tensor_shares_its_memory_and_is_no_view() -> None:
    fresh = torch.arange(6.0)
    own = reshaped(fresh, (2, 3))
    assert own.data_ptr() == fresh.data_ptr() and own.shape == (2, 3) and not own._is_view()


def test_a_version_tells_a_tensor_that_was_written_over() -> None:
    tensor = torch.zeros(2)
    before = version(tensor)
    tensor.add_(1)
    assert version(tensor) != before == version(torch.zeros(2))


def test_a_backward_is_told_from_a_forward() -> None:
    x, seen = torch.zeros(2, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(in_backward()))
    assert not in_backward()
    x.sum().backward()
    assert seen == [True] and not in_backward()


def test_a_tensor_without_values_asks_its_class_unless_that_is_left_out() -> None:
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return "asked"

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError("a value is read")

    tensor = valueless_tensor(Named, (2, 3), torch.bfloat16, torch.device("cpu"))
    assert torch.sum(tensor) == "asked"
    with without_overrides():
        assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 3), torch.bfloat16, torch.device("cpu"))
