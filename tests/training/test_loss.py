"""Our loss against transformers' own, on the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, LlamaForCausalLM

from dist_subspace.training import cross_entropy
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import forward, logits_memory, summed_loss
from tests.tiny_models import tiny_config
from tests.tiny_run import make_model


def micro_batch(inputs: dict[str, torch.Tensor], labels: torch.Tensor, targets: int) -> MicroBatch:
    return MicroBatch(0, inputs, labels, targets, len(labels), inputs["input_ids"].numel())


def test_the_mean_over_targets_is_the_loss_that_transformers_gives_a_causal_model(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_model(tmp_path / "model")).train()
    ids = torch.from_numpy(numpy.random.default_rng(0).integers(2, 200, (3, 20)))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[2, 12:] = -100
    targets = int((labels[:, 1:] != -100).sum())
    batch = micro_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, targets)
    ours = summed_loss(forward(model, batch, torch.device("cpu")), labels) / targets
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_the_mean_over_samples_is_the_loss_that_transformers_gives_a_classifier() -> None:
    model = BertForSequenceClassification(tiny_config("BertConfig", num_labels=3)).eval()
    ids = torch.from_numpy(numpy.random.default_rng(0).integers(2, 50, (4, 9)))
    labels = torch.tensor([0, 2, 1, 2])
    batch = micro_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, 4)
    ours = summed_loss(forward(model, batch, torch.device("cpu")), labels) / 4
    assert float(ours) == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-6)


def test_logits_of_16_bits_are_summed_up_in_float32() -> None:
    """A sum of many losses has no place in 16 bits: the last digits of the mean would be those of the type."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 300, 50, generator=generator), torch.randint(0, 50, (4, 300), generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits.to(dtype)
        shifted = rounded[:, :-1].double().flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(shifted, labels[:, 1:].flatten(), reduction="sum")
        found = summed_loss(rounded, labels)
        assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_rows_taken_after_one_another_give_the_same_loss_and_the_same_gradient(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own of all rows, in rows that do not go in evenly, with targets that are ignored, and where whole rows have
    none."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(*((3, 11) if kind == "tokens" else (33,)), 50, generator=draw).to(dtype)
    labels = torch.randint(0, 50, logits.shape[:-1], generator=draw)
    labels[0] = -100
    labels[-1, ...] = 7
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    rows, targets = (theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) if kind == "tokens" else (theirs, labels)
    expected = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="sum")
    expected.backward(torch.tensor(0.37))
    monkeypatch.setattr(cross_entropy, "PIECE", 200)
    loss = summed_loss(ours, labels)
    loss.backward(torch.tensor(0.37))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad is not None and ours.grad.count_nonzero() > 0


class Largest(TorchDispatchMode):
    """The most elements that an operation makes in float32, and in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = self.narrow = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.wide = max(self.wide, tensor.numel())
            elif isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.narrow = max(self.narrow, tensor.numel())
        return made


def test_long_rows_are_in_float32_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 1000)
    logits = torch.randn(1, 64, 50).bfloat16().requires_grad_()
    with Largest() as largest:
        summed_loss(logits, torch.zeros(1, 64, dtype=torch.long)).backward()
    assert largest.wide == 1000, "20 rows of 50"
    assert largest.narrow == logits.numel(), "their gradient"


def test_what_logits_take_is_a_piece_of_them() -> None:
    assert logits_memory(10**10) == 6 * cross_entropy.PIECE and logits_memory(500) == 3000


def test_a_decoder_keeps_no_keys_and_values_and_an_encoder_is_given_what_it_takes(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_model(tmp_path / "model")).train()
    seen: list[bool | None] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("use_cache", module.config.use_cache)), with_kwargs=True
    )
    ids = torch.arange(4, 20).view(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "unknown_to_it": ids}
    assert forward(model, micro_batch(inputs, ids, 14), torch.device("cpu")).shape == (2, 8, model.config.vocab_size)
    assert seen == [False]
