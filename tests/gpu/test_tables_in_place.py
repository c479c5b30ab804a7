"""Rows looked up and a head in pieces on the device: the losses and gradients of gathered ones, and a lower peak."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.subspace import named_trainables
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss, whole_logits_because
from tests.gpu.device import DEVICE
from tests.matrix import tiny
from tests.tables_in_place import from_the_first_byte
from tests.tiny_models import tiny_model

VOCABULARY, HIDDEN, LENGTH = 65_536, 512, 64
WHOLE = VOCABULARY * HIDDEN * 2  # bytes of the head


def step(folder: Path, where: Any, offload: bool) -> tuple[float, dict[str, Tensor], int]:
    extra = {"offload_param": {"device": "cpu", "pin_memory": True}} if offload else {}
    config = tiny.ds_config(3, trainable_numel=1 << 20, **extra)
    with where:
        model = load_frozen(folder, storage="bf16", deepspeed=config)
        attach(model, SubspaceConfig(method="lora", rank=4)).train()
        engine = tiny.make_engine(model, config)
        ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        batch = MicroBatch(0, {"input_ids": ids}, ids, 2 * (LENGTH - 1), 2, ids.numel())
        assert whole_logits_because(engine, batch, DEVICE) is None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = micro_batch_loss(engine, batch, DEVICE) / batch.targets
        engine.backward(loss)
        peak = torch.cuda.max_memory_allocated() - before
        gradients = {name: safe_get_full_grad(p).cpu() for name, p in named_trainables(model).items()}
        engine.destroy()
    return float(loss.detach()), gradients, peak


@pytest.mark.parametrize("offload", [False, True])
def test_as_with_gathered_ones_in_less_memory(offload: bool, tmp_path: Path) -> None:
    tiny_model(vocab_size=VOCABULARY, hidden_size=HIDDEN, tie_word_embeddings=False).save_pretrained(tmp_path)
    loss, gradients, peak = step(tmp_path, from_the_first_byte(piece=WHOLE // 16), offload)
    expected, others, plain = step(tmp_path, nullcontext(), offload)
    print(f"offload {offload}: peak {peak / 2**20:.0f} MiB, gathered {plain / 2**20:.0f} MiB")
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, gradient in others.items():
        assert float((gradients[name] - gradient).norm()) <= 5e-2 * float(gradient.norm()) + 1e-6, name
    assert plain - peak > WHOLE // 2
