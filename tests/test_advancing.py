"""`advance` in anyone's loop: gradients of the whole global batch, free of every scale, and decisions alike on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dist_subspace import SubspaceConfig, advance, attach, load_frozen, parameter_groups, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.tensors import gathered
from dist_subspace.subspace import attached
from tests.matrix import tiny
from tests.placement import hf_trainer as hf
from tests.ranks import run_on_ranks
from tests.tiny_models import odd_model, save_odd

STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"warmup_steps": 1, "final_steps": 2, "interval": 2},
    "flexlora": {"warmup_steps": 1, "final_steps": 2, "interval": 1, "budget": 3},
    "lora-dash": {"warmup_steps": 3, "directions": 2},
}
each_method = pytest.mark.parametrize("method", sorted(OPTIONS))


def model_with(method: str, model: nn.Module | None = None) -> Any:
    config = SubspaceConfig(method=method, rank=2, options=OPTIONS[method])
    return attach(odd_model("llama") if model is None else model, config).train()


def decisions(model: nn.Module) -> dict[str, Any]:
    """What the schedule has decided, by part."""
    found: dict[str, Any] = {}
    with gathered(trainable_parameters(model)):
        for name in attached(model).layers:
            part: Any = model.get_submodule(name)
            if hasattr(part, "dash_U"):
                found[name] = (part.dash_U @ part.dash_V).abs().sum().item()  # free of signs
            else:
                found[name] = ((part.lora_E != 0) if not hasattr(part, "active") else part.active).tolist()
    return found


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(model: nn.Module, ids: Tensor, parts: int) -> list[Tensor]:
    return [model(input_ids=part, labels=part, use_cache=False).loss / parts for part in ids.chunk(parts)]


def train(
    method: str,
    *,
    parts: int = 1,
    scale: float = 1.0,
    said: bool = False,
    cleared_first: bool = False,
    steps: int = STEPS,
) -> Any:
    """A plain loop: `parts` micro-batches a step, the loss multiplied as a scaler does it; `said` as a run's own loop says it."""
    model = model_with(method)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    for step in range(1, steps + 1):
        for loss in losses(model, tiny.global_batch(step), parts):
            if said:
                attached(model).accumulation.share(scale / parts)
            (loss * scale).backward()
        for parameter in trainable_parameters(model):
            parameter.grad /= scale  # type: ignore[operator]
        optimizer.step()
        if cleared_first:
            optimizer.zero_grad()
        advance(model, step, STEPS)
        if not cleared_first:
            optimizer.zero_grad()
    return model


def importance(model: nn.Module) -> dict[str, Tensor]:
    return attached(model).schedule.tensors()  # type: ignore[union-attr]


@each_method
def test_zero_grad_may_come_before_or_after(method: str) -> None:
    first, second = train(method), train(method, cleared_first=True)
    assert decisions(first) == decisions(second)
    one, other = trained(first), trained(second)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_importance_is_that_of_the_formula_with_the_weights_after_the_step() -> None:
    model = model_with("adalora")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    expected: dict[str, Tensor] = {}
    for step in (1, 2):
        losses(model, tiny.global_batch(step), 1)[0].backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                before = expected.get(name, torch.zeros_like(parameter))
                expected[name] = 0.85 * before + 0.15 * (parameter * parameter.grad).abs().detach()
        advance(model, step, 100)
        optimizer.zero_grad()
    found = importance(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}.importance"], value)
    assert any(value.any() for name, value in expected.items() if name.endswith("lora_A"))


@pytest.mark.parametrize(
    ("parts", "scale", "said"), [(2, 1.0, False), (1, 1024.0, False), (2, 64.0, False), (2, 64.0, True)]
)
def test_importance_is_free_of_accumulation_and_of_loss_scaling(parts: int, scale: float, said: bool) -> None:
    expected, found = (
        importance(train("adalora", steps=3)),
        importance(train("adalora", parts=parts, scale=scale, said=said, steps=3)),
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-9)


def test_adalora_ends_at_its_target_and_flexlora_at_the_rank_it_began_with() -> None:
    kept = decisions(train("adalora"))
    assert sum(map(sum, kept.values())) == 2 * len(kept) and len({sum(mask) for mask in kept.values()}) > 1
    moved = decisions(train("flexlora"))
    assert sum(map(sum, moved.values())) == 2 * len(moved) and len({sum(mask) for mask in moved.values()}) > 1


def test_lora_dash_trains_its_strengths_from_the_switch_on() -> None:
    for steps, strong in ((3, False), (4, True)):
        model = train("lora-dash", steps=steps)
        parts = [model.get_submodule(name) for name in attached(model).layers]
        assert all(bool(part.dash_U.any()) and bool(part.dash_delta.any()) == strong for part in parts)
    plan: Any = attached(model).schedule
    assert (plan.switched, plan.begun) == (3, 3)


def test_moments_of_a_new_triplet_are_zero_in_the_optimizer_of_a_plain_loop() -> None:
    model = model_with("flexlora")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    before: dict[str, list[bool]] = {}
    for step in range(1, STEPS + 1):
        losses(model, tiny.global_batch(step), 1)[0].backward()
        optimizer.step()
        before = {name: mask[:] for name, mask in decisions(model).items()}
        advance(model, step, STEPS)
        for name, mask in decisions(model).items():
            part: Any = model.get_submodule(name)
            for place in [i for i, (old, new) in enumerate(zip(before[name], mask, strict=True)) if new and not old]:
                assert not optimizer.state[part.lora_A]["exp_avg"][place].any()
                assert not optimizer.state[part.lora_B]["exp_avg_sq"][:, place].any()
                return
        optimizer.zero_grad()
    pytest.fail("no triplet moved")


def test_what_moves_loses_its_moments_and_nothing_else_does() -> None:
    """Of a triplet that comes those of its row, its column and its strength; of one that goes those of its strength."""
    model = model_with("flexlora")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    came = went = 0
    for step in range(1, STEPS + 1):
        losses(model, tiny.global_batch(step), 1)[0].backward()
        optimizer.step()
        before, kept = decisions(model), {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
        for state in optimizer.state.values():
            state["exp_avg"].fill_(1)
            state["exp_avg_sq"].fill_(1)
        advance(model, step, STEPS)
        for name, mask in decisions(model).items():
            part: Any = model.get_submodule(name)
            change = torch.tensor(mask).long() - torch.tensor(before[name]).long()
            stays = {part.lora_A: (change != 1)[:, None], part.lora_B: change != 1, part.lora_E: change == 0}
            came, went = came + int((change == 1).sum()), went + int((change == -1).sum())
            for parameter, where in stays.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    found = optimizer.state[parameter][key]
                    assert torch.equal(found, where.expand_as(found).float()), (name, key)
        for parameter, state in kept.items():
            optimizer.state[parameter].update(state)
        optimizer.zero_grad()
    assert came == went > 0, "no triplet moved"


def test_adam_counts_the_steps_of_strengths_from_the_switch_on_and_all_others_through() -> None:
    """Else the first updates of the strengths lack the correction of moments that begin at zero."""
    model = model_with("lora-dash")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    for step in range(1, 6):
        losses(model, tiny.global_batch(step), 1)[0].backward()
        optimizer.step()
        advance(model, step, STEPS)
        optimizer.zero_grad()
    counted = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}
    assert {count for name, count in counted.items() if name.endswith("dash_delta")} == {2}
    assert {count for name, count in counted.items() if not name.endswith("dash_delta")} == {5}


def test_a_method_without_a_schedule_and_a_wrapped_model_are_taken_and_lengths_checked() -> None:
    advance(attach(odd_model("llama"), SubspaceConfig(rank=2)), 1, 10)
    model = model_with("adalora")
    advance(nn.DataParallel(model), 1, 10)  # a wrapper as engines are, with the model as `module`
    with pytest.raises(UsageError, match="leaves no step of max_steps 3 between"):
        advance(model, 1, 3)


@pytest.mark.parametrize("advances", [False, True])
def test_a_loop_that_never_moves_the_schedule_on_is_told_once(advances: bool) -> None:
    model = model_with("adalora")
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1e-3)
    said: list[str] = []
    with heard(said.append):
        for step in range(1, 70):
            optimizer.zero_grad()
            if step in (1, 64):
                losses(model, tiny.global_batch(1), 1)[0].backward()
            optimizer.step()
            if advances:
                advance(model, step, 100)
    assert [("schedule of method adalora has not advanced" in line) for line in said] == ([] if advances else [True])


# Several ranks.


def one_rank_is_not_finite(broken: bool) -> dict[str, Tensor]:
    model = model_with("adalora")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-2)
    for step in (1, 2, 3):
        loss = losses(model, tiny.own_batch(step, world().rank, world().size), 1)[0]
        if step == 2:
            for parameter in trainable_parameters(model):  # the weights go on alike on both ranks
                parameter.grad = torch.ones_like(parameter)
            (loss * (float("inf") if broken and world().rank == 1 else 0.0)).backward()
            for parameter in trainable_parameters(model):
                parameter.grad = torch.ones_like(parameter)
        else:
            loss.backward()
            for parameter in trainable_parameters(model):
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        advance(model, step, 100)
        optimizer.zero_grad()
    return importance(model)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    first, second = run_on_ranks(2, one_rank_is_not_finite, True)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    unbroken = run_on_ranks(2, one_rank_is_not_finite, False)[0]  # a step of no weight is skipped too
    assert all(torch.equal(first[name], unbroken[name]) for name in first)


class Advance(TrainerCallback):
    """As the documentation has it."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advance(model, state.global_step, state.max_steps)


def with_trainer(method: str, folder: str, out: str, stage: int | None, rows: int) -> dict[str, Any]:
    from transformers import Trainer

    hf.forget_earlier_trainers()
    deepspeed = None if stage is None else hf.stock(stage)
    model = model_with(method, load_frozen(folder, storage="nf4", dtype="float32", deepspeed=deepspeed))
    args = hf.arguments(out, stage, False)
    args.max_steps, args.per_device_train_batch_size = STEPS, rows

    class WithOurGroups(Trainer):
        """What LoRA-Dash trains later is counted by itself at every stage. (DeepSpeed's Trainer drops `optimizers`.)"""

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.args.learning_rate))
            return self.optimizer

    data: Any = hf.rows()
    trainer = WithOurGroups(model=model, args=args, train_dataset=data, callbacks=[Advance()])
    trainer.train()
    facts = {
        "decisions": gather_objects(decisions(model)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "begun": attached(model).schedule.begun,  # type: ignore[union-attr]
        "importance": {name: tensor.cpu() for name, tensor in importance(model).items()},
    }
    hf.forget_earlier_trainers()
    return facts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


@each_method
def test_trainer_with_zero_decides_on_two_ranks_as_without_it_on_one(method: str, llama: str, tmp_path: Path) -> None:
    plain = run_on_ranks(1, with_trainer, method, llama, str(tmp_path), None, 8)[0]
    for stage in (2, 3):
        split = run_on_ranks(2, with_trainer, method, llama, str(tmp_path), stage, 4)[0]
        assert split["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert split["decisions"][0] == split["decisions"][1]
        assert split["begun"] == plain["begun"] == (3 if method == "lora-dash" else None)
        if method == "lora-dash":
            assert split["decisions"][0] == pytest.approx(plain["decisions"][0], rel=1e-3)
            assert all(value > 0 for value in split["decisions"][0].values())
        else:
            assert split["decisions"][0] == plain["decisions"][0]
        for name, value in plain["importance"].items():
            torch.testing.assert_close(split["importance"][name], value, rtol=2e-2, atol=1e-7)
