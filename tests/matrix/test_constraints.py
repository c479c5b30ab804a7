"""A constraint's gradient through DeepSpeed: the dense formula's, once a step, at every ZeRO stage, accumulated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.engine import DeepSpeedEngine
from dist_subspace.placement.tensors import full_numel, gathered
from dist_subspace.subspace import attached, named_trainables, trainable_parameters
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.engine import Stepper
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.subspace.golden import dense_penalty
from tests.tiny_models import save_odd

ROUNDS = 2
CONSTRAINT = SubspaceConfig(method="trilora", rank=2, constraint="mpc_d", constraint_weight=0.5)


def _model(folder: str, config: dict[str, Any] | None) -> nn.Module:
    model = load_frozen(folder, storage="fp32", deepspeed=config, device="cpu")
    attach(model, CONSTRAINT)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _sgd(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    del lr
    return torch.optim.SGD(parameters, lr=1.0)  # what a parameter loses in a step is its gradient


def _ids(rank: int, number: int) -> Tensor:
    return tiny.global_batch(10 * number + rank)


def gradients_through_deepspeed(folder: str, stage: int, reentrant: bool, our_loop: bool) -> dict[str, Tensor]:
    """What a step of two micro-batches a rank takes from each trained parameter, and the logged penalty."""
    size = world().size
    model = _model(folder, tiny.ds_config(stage, world_size=size))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    numel = sum(full_numel(p) for p in trainable_parameters(model))
    config = tiny.ds_config(stage, trainable_numel=numel, world_size=size)
    config |= {"gradient_accumulation_steps": ROUNDS, "train_batch_size": tiny.BATCH // size * size * ROUNDS}
    engine = tiny.make_engine(model, config, _sgd)
    named = named_trainables(model)
    with gathered(named.values()):
        before = {name: p.detach().clone() for name, p in named.items()}
    engine.train()
    batches = [_ids(world().rank, number) for number in range(ROUNDS)]
    if our_loop:
        _our_step(engine, batches, size)
    else:
        for ids in batches:
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
    with gathered(named.values()):
        taken = {name: before[name] - p.detach() for name, p in named.items()}
    penalties = attached(model).penalties
    assert penalties is not None
    return taken | {"penalty": torch.tensor(penalties.total())}


def _our_step(engine: Any, batches: list[Tensor], size: int) -> None:
    targets = sum(ids[:, 1:].numel() for ids in batches)
    micros = [MicroBatch(n, {"input_ids": ids}, ids, ids[:, 1:].numel(), len(ids), 0) for n, ids in enumerate(batches)]
    driven = DeepSpeedEngine(engine)
    stepper = Stepper(driven, torch.device("cpu"), 0, size)
    stepper.accumulate(GlobalBatch(0, list(micros), micros[0], targets * size, samples=0, tokens=0, epoch=0.0))
    driven.step(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_odd(tmp_path_factory.mktemp("constraints"), "llama"))


def _expected(folder: Path, ranks: int) -> dict[str, Tensor]:
    """The gradient of the mean loss over all micro-batches plus the penalty, by autograd in one process."""
    model = _model(str(folder), None).eval()
    constraint = attached(model).settings.constraint
    assert constraint is not None
    all_ids = [_ids(rank, number) for rank in range(ranks) for number in range(ROUNDS)]
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in all_ids]
    penalty = dense_penalty(model, constraint)
    named = named_trainables(model)
    gradients = torch.autograd.grad(sum(losses) / len(losses) + penalty, list(named.values()))
    return dict(zip(named, gradients, strict=True)) | {"penalty": penalty.detach()}


@pytest.mark.parametrize("our_loop", [True, False], ids=["our-loop", "engine-backward"])
@pytest.mark.parametrize(("stage", "reentrant"), [(0, False), (1, True), (2, False), (3, False), (3, True)])
def test_the_penaltys_gradient_is_the_dense_formulas_once_a_step(
    stage: int, reentrant: bool, our_loop: bool, folder: Path
) -> None:
    expected = _expected(folder, ranks=2)
    for taken in run_on_ranks(2, gradients_through_deepspeed, str(folder), stage, reentrant, our_loop):
        for name, gradient in expected.items():
            torch.testing.assert_close(taken[name], gradient, rtol=1e-3, atol=1e-5, msg=f"{name} at stage {stage}")
