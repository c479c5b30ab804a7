"""One optimizer step over a global batch: weighted by targets, the same whatever rank a micro-batch falls on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import sum_over_ranks, world
from dist_subspace.placement.tensors import gathered
from dist_subspace.subspace import named_trainables, trainable_parameters
from dist_subspace.training.loss import summed_loss
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd
from tests.training.engines import close, global_batch, micro_batch, stepper_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def three_steps(folder: str, stage: int | None, count: int) -> dict[str, Any]:
    batch = global_batch(count)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    losses = []
    for _ in range(3):
        total = sum_over_ranks([stepper.accumulate(batch)])[0]
        assert engine.step(True)
        losses.append(total / batch.targets)
    state = engine.read_state(named_trainables(engine.module))
    close(engine)
    return {"losses": losses, "state": state}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_micro_batches_that_the_ranks_do_not_divide_train_as_on_one_rank(llama: str, stage: int | None) -> None:
    """Three micro-batches on two ranks: in the second round one rank idles. Losses and moments are those of one rank."""
    one = run_on_ranks(1, three_steps, llama, 0, 3)[0]
    for rank in run_on_ranks(2, three_steps, llama, stage, 3):
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert_close(rank["state"], one["state"], "exp_avg")


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    for name, tensor in expected.items():
        if name.endswith("." + kind):
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-6, msg=name)


def skipped_step(folder: str, stage: int | None) -> list[bool]:
    """A step that is said not to be finite, and a finite one after it: what each changed."""
    batch = global_batch(2)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    moved = []
    for finite in (False, True):
        before = engine.read_state(named_trainables(engine.module))
        stepper.accumulate(batch)
        assert engine.step(finite) == finite
        after = engine.read_state(named_trainables(engine.module))
        moved.append(any(not torch.equal(after[name], before[name]) for name in before))
    close(engine)
    return moved


def test_a_step_that_is_not_finite_changes_nothing_where_nothing_is_split(llama: str) -> None:
    assert run_on_ranks(2, skipped_step, llama, 0) == [[False, True]] * 2
    assert run_on_ranks(1, skipped_step, llama, None) == [[False, True]]


def gradient_poisoned(folder: str, stage: int | None) -> dict[str, Any]:
    """One rank's adapter input is not a number: every rank must skip the step, and go on after it."""
    batch = global_batch(2)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    poison = _nan_on_rank_1(engine.module)
    before = engine.read_state(named_trainables(engine.module))
    total = sum_over_ranks([stepper.accumulate(batch)])[0]
    applied = engine.step(math.isfinite(total))
    poison.remove()
    after = engine.read_state(named_trainables(engine.module))
    same = all(torch.equal(after[name], before[name]) for name in before)
    again = sum_over_ranks([stepper.accumulate(batch)])[0]
    found = {
        "applied": applied,
        "same": same,
        "then": engine.step(math.isfinite(again)),
        "loss": math.isfinite(again),
    }
    close(engine)
    return found


def _nan_on_rank_1(model: torch.nn.Module) -> Any:
    def poison(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * float("nan") if world().rank == 1 else output

    return model.get_input_embeddings().register_forward_hook(poison)  # type: ignore[operator]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_with_a_loss_that_is_no_number_makes_all_skip_and_go_on(llama: str, stage: int | None) -> None:
    for rank in run_on_ranks(2, gradient_poisoned, llama, stage):
        assert rank == {"applied": False, "same": True, "then": True, "loss": True}


def after_an_infinite_loss(folder: str, stage: int | None) -> tuple[bool, bool, bool]:
    """The label of one target is impossible, as a model may make it (Chameleon's image tokens): the loss is infinite, and the
    gradient is not. Returns whether that step was applied, whether it changed anything, whether the next one was applied."""
    batch = global_batch(3)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    labels = batch.filler.labels
    label = labels[labels >= 0][:1]
    handle = engine.module.lm_head.register_forward_hook(lambda head, inputs, out: out.index_fill(-1, label, -math.inf))
    before = values(engine)
    assert stepper.accumulate(batch) == math.inf
    applied, changed = engine.step(False), values(engine) != before
    handle.remove()
    stepper.accumulate(batch)
    following = engine.step(True)
    close(engine)
    return applied, changed, following


def values(engine: Any) -> list[list[float]]:
    parameters = trainable_parameters(engine.module)
    with gathered(parameters):
        return [parameter.detach().flatten().tolist() for parameter in parameters]


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_step_whose_loss_is_infinite_is_skipped_though_its_gradient_is_finite(stage: int | None, llama: str) -> None:
    assert run_on_ranks(1, after_an_infinite_loss, llama, stage) == [(False, False, True)]


LOST, STEPS = 2, 4  # of four steps the second has a gradient that is not finite


def with_a_broken_gradient(folder: str, stage: int | None, value: float) -> dict[str, Any]:
    """In one step one number of one rank's gradient is none, while the loss is finite as ever."""
    batch = global_batch(3)
    engine, stepper = stepper_of(folder, stage, len(batch.rounds))
    last = trainable_parameters(engine.module)[-1]
    applied, norms = [], []
    for step in range(1, STEPS + 1):
        broken = step == LOST and world().rank == world().size - 1
        hook = last.register_hook(lambda gradient: broken_at_one_place(gradient, value)) if broken else None
        total = sum_over_ranks([stepper.accumulate(batch)])[0]
        if hook is not None:
            hook.remove()
        assert math.isfinite(total)
        applied.append(engine.step(True))
        norms.append(engine.grad_norm)
    state = engine.read_state(named_trainables(engine.module))
    close(engine)
    return {"applied": applied, "state": state, "norms": norms}


def broken_at_one_place(gradient: Tensor, value: float) -> Tensor:
    changed = gradient.clone()
    changed[(-1,) * changed.dim()] = value
    return changed


def steps_of_plain_torch(folder: str) -> dict[str, Any]:
    """The mean over all targets, torch's AdamW, and no step where one is left out."""
    model = attach(load_frozen(folder, storage="nf4", dtype="float32"), SubspaceConfig(method="lora", rank=3)).train()
    named = named_trainables(model)
    optimizer = tiny.adam(list(named.values()), lr=tiny.RATE)
    micro, norms = [micro_batch(number) for number in range(3)], []
    for step in range(1, STEPS + 1):
        total: Tensor = sum(summed_loss(model(**m.inputs).logits, m.labels) for m in micro)  # type: ignore[assignment]
        (total / sum(m.targets for m in micro)).backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])))
        if step != LOST:
            optimizer.step()
        optimizer.zero_grad()
    state = {f"{name}.master": p.detach().clone() for name, p in named.items()}
    for name, parameter in named.items():
        state |= {f"{name}.{kind}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return {"state": state, "norms": norms}


@pytest.fixture(scope="module")
def plain(llama: str) -> dict[str, Any]:
    return run_on_ranks(1, steps_of_plain_torch, llama)[0]


@pytest.mark.parametrize(
    ("stage", "ranks", "value"),
    [
        (None, 1, math.inf),
        (None, 1, math.nan),
        (0, 1, math.inf),
        (0, 1, math.nan),
        (0, 2, -math.inf),
        *((stage, 2, math.inf) for stage in (1, 2, 3)),
    ],
)
def test_a_step_with_one_gradient_that_is_not_finite_is_left_out_and_the_others_are_plain_torchs(
    stage: int | None, ranks: int, value: float, llama: str, plain: dict[str, Any]
) -> None:
    for rank in run_on_ranks(ranks, with_a_broken_gradient, llama, stage, value):
        assert rank["applied"] == [step != LOST for step in range(1, STEPS + 1)]
        finite = [norm for step, norm in enumerate(rank["norms"], 1) if step != LOST]
        assert finite == pytest.approx([n for step, n in enumerate(plain["norms"], 1) if step != LOST], rel=1e-4)
        assert rank["state"].keys() == plain["state"].keys()
        for name, expected in plain["state"].items():
            torch.testing.assert_close(rank["state"][name], expected, rtol=1e-3, atol=1e-6, msg=name)
