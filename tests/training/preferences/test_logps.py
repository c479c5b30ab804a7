"""Log probabilities of answers and their gradients are those of plain transformers, whichever storage holds the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training import cross_entropy
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.preferences.logps import measured_logps, token_logps
from tests.tiny_models import VOCABULARY, tiny_model

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.7, -1.3, 2.0])  # what a loss of preferences makes of its rows, one by one


def batch_of() -> MicroBatch:
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = labels[2, 0] = labels[2, 6:] = -100
    labels[:, 0] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return MicroBatch(0, inputs, labels, int((labels >= 0).sum()), 3, 27)


def plain(model: Any, batch: MicroBatch) -> Tensor:
    logits = model(**batch.inputs).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(labels < 0, 0.0)


@pytest.mark.parametrize("head", ["dense", "nf4", "trained"])
def test_each_row_has_its_own_weight_in_the_gradient(head: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a head whose bytes come in pieces, and where the head itself is trained."""
    monkeypatch.setattr(cross_entropy, "PIECE", 3 * VOCABULARY)
    tiny_model("LlamaForCausalLM", tie_word_embeddings=False).save_pretrained(tmp_path)
    held = {"head_storage": "nf4"} if head == "nf4" else {}
    model = load_frozen(tmp_path, storage="nf4" if held else "fp32", dtype=torch.float32, **held)
    saved = ["lm_head"] if head == "trained" else []
    attach(model, SubspaceConfig(method="lora", rank=2, modules_to_save=saved))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch, trained = batch_of(), list(trainable_parameters(model))
    found, balance = token_logps(model, batch, CPU)
    expected = plain(model, batch)
    assert balance is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad((logps.sum(1) * WEIGHTS).sum(), trained, retain_graph=True) for logps in (found, expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(measured_logps(model, batch, CPU), expected.sum(1).detach(), rtol=1e-4, atol=1e-4)
