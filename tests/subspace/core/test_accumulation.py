"""How much of a step's loss one backward stands for: as the loop says, else as the gradient of the model's own loss tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.subspace.core.accumulation import IGNORED, Accumulation, watch_loss


class Model(nn.Module):
    """A mean loss over two weights."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.config = SimpleNamespace(**config)

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        return {"loss": None if labels is None else self.weight.square().mean(), "logits": self.weight * 2}


def watched(**config: Any) -> tuple[Model, Accumulation]:
    model, accumulation = Model(**config), Accumulation()
    watch_loss(model, accumulation)
    return model.train(), accumulation


LABELS = torch.tensor([[5, 6, IGNORED]])


def test_the_loss_is_unchanged_and_its_gradient_tells_the_weight() -> None:
    model, accumulation = watched()
    loss = model(labels=LABELS)["loss"]
    assert loss.item() == 2.5
    (loss * 0.25).backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor([0.25, 0.5]))
    assert float(accumulation.weight) == 0.25 and accumulation.total == 0.25
    (model(labels=LABELS)["loss"] * 0.5).backward()
    assert float(accumulation.weight) == 0.5 and accumulation.total == 0.75
    accumulation.restart()
    assert accumulation.total == 1.0


def test_what_a_loop_says_counts_and_the_gradient_does_not() -> None:
    model, accumulation = watched()
    accumulation.share(0.75)
    (model(labels=LABELS)["loss"] * 1024).backward()
    assert accumulation.weight == 0.75 and accumulation.total == 0.75
    accumulation.share(0.25)
    assert accumulation.weight == 0.25 and accumulation.total == 1.0


def test_a_forward_without_a_loss_or_outside_of_training_says_nothing() -> None:
    model, accumulation = watched()
    (model(labels=LABELS)["loss"] * 0.25).backward()
    model()["logits"].sum().backward()
    assert accumulation.weight == 1.0
    model.eval()
    (model(labels=LABELS)["loss"] * 8).backward()
    assert accumulation.weight == 1.0 and accumulation.total == 0.25


def test_a_loss_divided_by_the_targets_of_the_whole_step_has_its_share_of_them() -> None:
    model, accumulation = watched()
    model(labels=LABELS, num_items_in_batch=8)["loss"].backward()
    assert float(accumulation.weight) == 2 / 8
    causal, accumulation = watched(is_encoder_decoder=False)
    causal.loss_type = "ForCausalLM"  # type: ignore[assignment]
    causal(labels=LABELS, num_items_in_batch=8)["loss"].backward()
    assert float(accumulation.weight) == 1 / 8  # the first label of a row is no target
