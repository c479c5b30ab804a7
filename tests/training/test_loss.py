"""Our loss against transformers' own, on the same batch."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM

from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import forward, summed_loss
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
