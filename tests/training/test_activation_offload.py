"""What backward reads is kept elsewhere: the same losses and gradients, of which tensors, for how long. On a GPU: tests/gpu."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training import activation_offload as module
from dist_subspace.training.activation_offload import Offload, activation_offload, kept_here
from tests.tiny_models import VOCABULARY, tiny_model

CPU = torch.device("cpu")
LAYERS = 2
IDS = torch.arange(3, 3 + 24).view(2, 12) % VOCABULARY


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROM", 2 * 12 * 32 * 4)  # bytes of the hidden states


def gradients(keep: Any, checkpointing: bool | None) -> tuple[float, list[Tensor]]:
    """checkpointing: whether in the reentrant form; None for none."""
    model = attach(tiny_model(), SubspaceConfig(method="lora", rank=2)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    with keep():
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_losses_and_gradients_are_the_same_and_with_checkpointing_inputs_of_blocks_alone_are_moved(
    checkpointing: bool | None,
) -> None:
    offload = Offload(CPU)
    loss, found = gradients(offload, checkpointing)
    expected, others = gradients(nullcontext, checkpointing)
    assert loss == expected and len(found) == len(others) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, others, strict=True))
    behind = 4  # what the final norm and the loss of whole logits save
    assert offload.moved == LAYERS + behind if checkpointing is not None else offload.moved > 10 * LAYERS


def moved(*tensors: Tensor) -> int:
    offload = Offload(CPU)
    for tensor in tensors:
        with offload():
            (tensor * torch.ones(1, requires_grad=True)).sum().backward()
    return offload.moved


def test_parameters_their_views_numbers_of_few_bytes_and_integers_stay() -> None:
    large = torch.ones(64, 64)
    assert moved(large) == 1
    weight = nn.Parameter(large.clone())
    assert moved(weight, weight.t(), torch.ones(2), large.long()) == 0


def test_what_is_kept_here_stays_and_nothing_is_held_when_the_graph_is_gone() -> None:
    offload, large = Offload(CPU), torch.ones(64, 64)
    with offload(), kept_here():
        (large * torch.ones(64, 64, requires_grad=True)).sum().backward()
    assert offload.moved == 0
    with offload():
        loss = (large * torch.ones(64, 64, requires_grad=True)).sum()
    assert len(offload._away) == 1
    del loss
    assert len(offload._away) == 0


def test_on_a_cpu_nothing_is_moved_and_that_is_said() -> None:
    said: list[str] = []
    assert activation_offload(True, CPU, said.append) is nullcontext
    assert said == [
        "training.activation_offload is true, and activations lie in the computer's memory already: nothing is moved"
    ]
    assert activation_offload(False, CPU, said.append) is nullcontext and len(said) == 1
