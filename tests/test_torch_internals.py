"""What is asked of torch below its public surface answers, and answers what the products themselves show."""

from __future__ import annotations

import torch

from dist_subspace.torch_internals import cpu_multiplies, reshaped


def test_torch_says_which_types_its_cpu_products_have() -> None:
    assert cpu_multiplies(torch.float32) and cpu_multiplies(torch.float64)
    assert isinstance(cpu_multiplies(torch.bfloat16), bool) and isinstance(cpu_multiplies(torch.float16), bool)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not cpu_multiplies(torch.bfloat16)


def test_a_reshaped_tensor_shares_its_memory_and_is_no_view() -> None:
    fresh = torch.arange(6.0)
    own = reshaped(fresh, (2, 3))
    assert own.data_ptr() == fresh.data_ptr() and own.shape == (2, 3) and not own._is_view()
