"""AdaLoRA's schedule: budget, scores and masks by their golden numbers and by PEFT's own allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.adalora.config import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace import SubspaceConfig, resolve
from dist_subspace.subspace.schedules.cutting import CuttingSchedule, lowest
from dist_subspace.subspace.schedules.importance import Importance
from tests.subspace.golden import layer


def schedule(layers: int = 2, rank: int = 2, init_rank: int = 3, **options: Any) -> CuttingSchedule:
    config = {"method": "adalora", "rank": rank, "options": {"init_rank": init_rank, **options}}
    parts = {f"layer{i}": layer(**config) for i in range(layers)}
    return CuttingSchedule(parts, resolve(SubspaceConfig(**config)).settings)


def test_the_budget_follows_the_golden_curve() -> None:
    plan = schedule(layers=8, rank=1, init_rank=3, warmup_steps=10, final_steps=20)
    plan.target = 12  # b0 = 24, bT = 12
    golden = {0: 24, 10: 24, 11: 23, 20: 19, 30: 16, 45: 13, 60: 12, 80: 12} | dict.fromkeys(range(81, 101), 12)
    assert {t: plan.budget(t, 100) for t in golden} == golden


def test_the_target_is_the_sum_of_the_layers_own_ranks() -> None:
    """Of a rank pattern's too."""
    parts = {f"layer{rank}": layer("adalora", rank=rank, options={"init_rank": 3}) for rank in (1, 3, 3)}
    plan = CuttingSchedule(parts, resolve(SubspaceConfig("adalora", rank=1, options={"init_rank": 3})).settings)
    assert (plan.budget(0, 100), plan.budget(100, 100)) == (6, 4)


def test_the_score_of_an_entry_is_the_golden_one() -> None:
    state = Importance(0.85, 0.85)
    expected = ((0.03, 0.0255), (0.0855, 0.06885), (0.087675, 0.06037125))
    for sensitivity, (smoothed, uncertainty) in zip((0.2, 0.4, 0.1), expected, strict=True):
        state.update("w", torch.tensor([-2.0]), torch.tensor([sensitivity / 2]))
        assert float(state.smoothed["w"]) == pytest.approx(smoothed)
        assert float(state.uncertainty["w"]) == pytest.approx(uncertainty)
    assert float(state.score("w")) == pytest.approx(0.0052930493)


def test_the_mask_zeroes_the_golden_triplets() -> None:
    masks = lowest([torch.tensor([0.5, 0.1, 0.3]), torch.tensor([0.2, 0.4, 0.05])], 2)
    assert [mask.tolist() for mask in masks] == [[False, True, False], [False, False, True]]


def gradients(plan: CuttingSchedule, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    parameters = {f"{name}.{own}": p for name, part in plan.parts.items() for own, p in part.trainables().items()}
    return {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def write(edits: list[Any]) -> None:
    for edit in edits:
        edit.parameter.data.masked_fill_(edit.where, edit.value)


class PeftModelOfOurs(nn.Module):
    """Our layers under the names by which PEFT's allocator knows its own."""

    def __init__(self, plan: CuttingSchedule) -> None:
        super().__init__()
        for name, part in plan.parts.items():
            values = {"lora_A": part.lora_A, "lora_B": part.lora_B, "lora_E": part.lora_E[:, None]}
            held = {own: nn.ParameterDict({"default": nn.Parameter(v.detach().clone())}) for own, v in values.items()}
            self.add_module(name, nn.ModuleDict(held))


@pytest.mark.parametrize("interval", [1, 3])
def test_the_masks_are_those_of_pefts_allocator_over_a_whole_run(interval: int) -> None:
    total = 30
    plan = schedule(layers=4, warmup_steps=4, final_steps=6, interval=interval)
    for part in plan.parts.values():
        part.lora_E.data.normal_()
    theirs = PeftModelOfOurs(plan)
    config = AdaLoraConfig(
        target_r=2, init_r=3, tinit=4, tfinal=6, deltaT=interval, beta1=0.85, beta2=0.85, total_step=total
    )
    allocator = RankAllocator(theirs, config, "default")
    seen = set()
    for step in range(1, total + 1):
        generator = torch.Generator().manual_seed(1000 + step)
        found = gradients(plan, step)
        for name, part in plan.parts.items():
            for own, parameter in part.trainables().items():
                moved = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(moved)
                peer = getattr(theirs, name)[own]["default"]
                peer.data.add_(moved.view(peer.shape))
                peer.grad = found[f"{name}.{own}"].view(peer.shape).clone()
        write(plan.advance(step, total, found))
        allocator.update_and_allocate(theirs, step)
        ours = torch.cat([part.lora_E.detach() for part in plan.parts.values()])
        expected = torch.cat([getattr(theirs, name)["lora_E"]["default"].detach()[:, 0] for name in plan.parts])
        torch.testing.assert_close(ours, expected)
        seen.add(int((ours == 0).sum()))
    assert len(seen) > 2 and max(seen) == 4  # 12 triplets at the start, 8 at the end


def test_a_triplet_may_grow_again_before_the_final_phase_and_not_in_it() -> None:
    plan = schedule(layers=2, warmup_steps=0, final_steps=4, interval=3)
    kept = {}
    for step in range(1, 13):
        for part in plan.parts.values():
            part.lora_E.data.add_(0.01)  # as an optimizer does, to the zeroed ones too
        write(plan.advance(step, 12, gradients(plan, step)))
        kept[step] = torch.cat([part.lora_E.detach() != 0 for part in plan.parts.values()])
    assert [int(kept[step].sum()) for step in (3, 4, 6, 7)] == [4, 6, 4, 6]  # b(3) = int(4 + 2 (5/8)^3)
    assert all(torch.equal(kept[step], kept[9]) for step in range(9, 13)) and int(kept[9].sum()) == 4


def test_nothing_is_masked_in_the_warm_up_nor_where_all_may_stay() -> None:
    plan = schedule(warmup_steps=5, final_steps=2, interval=1)
    assert all(plan.advance(t, 12, gradients(plan, t)) == [] for t in range(1, 6))
    assert plan.advance(6, 12, gradients(plan, 6)) != []
    same = schedule(rank=3, warmup_steps=0, final_steps=0, interval=1)  # target and start are equal
    assert all(same.advance(t, 12, gradients(same, t)) == [] for t in range(1, 13))


def test_without_any_gradient_seen_nothing_is_cut() -> None:
    plan = schedule(warmup_steps=0, final_steps=3, interval=1)
    assert all(plan.advance(t, 12, {}) == [] for t in range(1, 13))


def test_gradients_are_asked_for_until_the_final_phase() -> None:
    plan = schedule(warmup_steps=2, final_steps=4)
    assert [plan.uses_gradients(t, 12) for t in (1, 7, 8, 12)] == [True, True, False, False]


def test_state_comes_back_and_goes_on_alike() -> None:
    first, second = schedule(layers=3, warmup_steps=1, final_steps=4), schedule(layers=3, warmup_steps=1, final_steps=4)
    for step in range(1, 7):
        first.advance(step, 12, gradients(first, step))
    second.restore(first.state(), {key: tensor.clone() for key, tensor in first.tensors().items()})
    assert set(first.tensors()) == {
        f"layer{i}.lora_{own}.{kind}" for i in range(3) for own in "ABE" for kind in ("importance", "uncertainty")
    }
    for step in range(7, 13):
        one, other = (plan.advance(step, 12, gradients(plan, step)) for plan in (first, second))
        assert [e.where.tolist() for e in one] == [e.where.tolist() for e in other]


def test_unset_lengths_are_a_tenth_three_tenths_and_a_hundredth_of_the_run() -> None:
    plan = schedule(layers=1)
    plan.parts["layer0"].lora_E.data.normal_()
    cut = [t for t in range(1, 301) if plan.advance(t, 300, gradients(plan, t))]
    assert cut == [*range(33, 211, 3), *range(211, 301)]  # each third step between the phases, all of the final one
    short = schedule(layers=1)
    short.parts["layer0"].lora_E.data.normal_()
    assert [t for t in range(1, 11) if short.advance(t, 10, gradients(short, t))] == list(range(2, 11))


def test_phases_that_do_not_fit_are_refused_with_their_values() -> None:
    message = (
        r"subspace\.options\.warmup_steps is 80 and subspace\.options\.final_steps is 30, which leaves no step of "
        r"max_steps 100 between; accepted: a sum below it"
    )
    with pytest.raises(UsageError, match=message):
        schedule(warmup_steps=80).check(100)
    schedule(warmup_steps=69).check(100)
    for steps in range(1, 40):
        schedule().check(steps)  # its own lengths fit every run
