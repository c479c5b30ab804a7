"""What a process has held is told in bytes, and a failed allocation is told from other errors, with what to lower."""

from __future__ import annotations

import resource

import numpy
import psutil
import pytest
import torch

from dist_subspace.training.memory import advice, is_out_of_memory, peak_memory

CPU = torch.device("cpu")


def test_the_peak_is_what_the_kernel_says_in_bytes() -> None:
    """It grows by what is held, and is not below what is held now."""
    before, held = peak_memory(CPU), psutil.Process().memory_info().rss
    assert before >= 0.9 * held
    block = numpy.ones(2**27, dtype=numpy.uint8)
    wanted = psutil.Process().memory_info().rss
    assert peak_memory(CPU) >= 0.9 * wanted and len(block) == 2**27
    assert peak_memory(CPU) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_failed_allocation_is_known_whoever_made_it_and_nothing_else_is() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as pythons:
        numpy.empty(2**60, dtype=numpy.uint8)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert is_out_of_memory(torchs.value) and is_out_of_memory(pythons.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(other.value) and not is_out_of_memory(OSError(28, "No space left on device"))


def test_the_advice_is_what_the_logits_and_the_kept_activations_take() -> None:
    """Of four rows of 2,048 tokens: 2 bytes for each of 4,096 numbers that each of 32 blocks keeps, of which there are about 16
    without checkpointing. Half the rows save half. Logits are of some rows at a time, and no matter of their number."""
    tokens = 4 * 2048
    one_a_block = 2 * tokens * 4096 * 32
    gib = 2**30
    said = advice(4, 2048, 128_256, 4096, 32, False)
    assert said.startswith("out of memory: training.per_device_train_batch_size=2 saves about ")
    assert f"batch_size=2 saves about {16 * one_a_block / 2 / gib:.2f} GiB;" in said
    assert f"training.gradient_checkpointing=true saves about {15 * one_a_block / gib:.2f} GiB" in said
    said = advice(1, 2048, 128_256, 4096, 32, True)
    assert f"data.max_length=1024 saves about {one_a_block / 4 / 2 / gib:.2f} GiB;" in said
    assert "activation_offload" not in said, "on a CPU they lie there anyway"
    told = advice(1, 2048, 128_256, 4096, 32, True, offloads=False)
    assert f"training.activation_offload=true saves about {one_a_block / 4 / gib:.2f} GiB;" in told
    assert "gradient_checkpointing" not in said and said.endswith("shrink the frozen weights a rank keeps")
    small = 6 * 64 * 4096 + 2 * 64 * 64 * 2
    assert f"saves about {small / 2**20:.0f} MiB" in advice(2, 64, 4096, 64, 2, True), "logits that are taken at once"
