"""Activations off the GPU: the same losses and gradients to the bit, a lower peak, and copies beside the computation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dist_subspace import SubspaceConfig, attach
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.activation_offload import Offload
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss
from tests.gpu.device import DEVICE
from tests.tiny_models import tiny_config

HIDDEN, LAYERS, ROWS, LENGTH, VOCABULARY = 1024, 12, 4, 1024, 4096
INPUT = ROWS * LENGTH * HIDDEN * 2  # bytes of a block's input


def model_of(checkpointing: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    config = tiny_config(
        "LlamaConfig",
        **{**sizes, "num_key_value_heads": 16, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH},
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    model = attach(model, SubspaceConfig(method="lora", rank=8)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def steps(model: Any, keep: Any) -> tuple[list[float], list[Tensor], int]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(0, {"input_ids": ids}, ids, ROWS * (LENGTH - 1), ROWS, ids.numel())
    losses = []
    for step in range(3):
        if step == 1:  # the first has made what stays
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        model.zero_grad(set_to_none=True)
        with keep():
            loss = micro_batch_loss(model, batch, DEVICE) / batch.targets
        loss.backward()
        losses.append(float(loss.detach()))
    peak = torch.cuda.max_memory_allocated() - before
    return losses, [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None], peak


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_same_to_the_bit_in_less_memory(checkpointing: bool) -> None:
    model, offload = model_of(checkpointing), Offload(DEVICE)
    losses, gradients, peak = steps(model, offload)
    expected, others, plain = steps(model, nullcontext)
    print(
        f"checkpointing {checkpointing}: peak {peak / 2**20:.0f} MiB, without {plain / 2**20:.0f}, moved {offload.moved}"
    )
    assert losses == expected
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    assert plain - peak > (LAYERS - 5) * INPUT
