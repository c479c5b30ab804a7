"""FlexLoRA's schedule: importance and moves by their golden numbers; ranks and outputs that must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.placement.edits import apply_edits
from dist_subspace.subspace import SubspaceConfig, resolve
from dist_subspace.subspace.schedules.moving import MovingSchedule, choose, importance, moves, weakest
from tests.subspace.golden import X, layer

CORES = ([1.0, 1, 1, 1], [3.0, 1, 0.5, 0], [2.0, 1], [5.0, 0.1, 0.1])


def cores() -> list[Tensor]:
    return [torch.tensor(core, dtype=torch.float64) for core in CORES]


def test_importance_is_the_golden_entropy() -> None:
    golden = (0.9999999711, 0.3114918337, 0.7219280660, 0.0064207215)
    assert [importance(core) for core in cores()] == pytest.approx(golden, abs=1e-10)


def test_importance_is_zero_for_one_triplet_and_within_its_bounds() -> None:
    assert importance(torch.tensor([3.0], dtype=torch.float64)) == 0.0
    assert importance(torch.tensor([1.0, 0, 0], dtype=torch.float64)) == 0.0  # -1.4e-8 before it is clamped


def test_the_number_of_moves_is_the_golden_one() -> None:
    assert [moves(4, p) for p in (0, 0.25, 0.5, 0.75, 1)] == [4, 2, 0, 0, 0]


def test_the_golden_step_moves_a_triplet_from_the_fourth_layer_to_the_first() -> None:
    values = [importance(core) for core in cores()]
    losing, gaining = choose(values, [4, 4, 2, 3], [1, 1, 1, 1], 1)
    assert (losing, gaining) == ([3], [0]) and weakest(cores()[3]) == 2


def test_layers_that_would_do_both_do_neither_and_as_many_lose_as_gain() -> None:
    assert choose([0.1, 0.5, 0.9], [4, 4, 4], [4, 4, 4], 2) == ([0], [2])
    assert choose([0.1, 0.5, 0.9], [4, 4, 4], [4, 4, 4], 3) == ([], [])
    assert choose([0.1, 0.5, 0.9], [1, 1, 4], [4, 4, 4], 1) == (
        [],
        [],
    )  # the only one that can lose is the one that gains
    assert choose([0.1, 0.2, 0.8, 0.9], [4, 4, 4, 4], [4, 4, 0, 4], 2) == ([0], [3])  # the second would gain too
    assert choose([0.0, 0.0, 0.0, 1.0], [2, 1, 2, 2], [1, 1, 1, 1], 1) == ([0], [3])


def test_the_weakest_is_by_magnitude_and_not_by_sign() -> None:
    assert weakest(torch.tensor([-5.0, 0.5, 2])) == 1


def schedule(layers: int = 4, rank: int = 2, **options: Any) -> MovingSchedule:
    config = {"method": "flexlora", "rank": rank, "options": {"max_rank": 3, **options}}
    parts = {f"layer{i}": layer(**config) for i in range(layers)}
    for number, part in enumerate(parts.values()):
        part.lora_E.data.copy_(torch.tensor([1.0, 1 - 0.2 * number, 0]))
    return MovingSchedule(parts, resolve(SubspaceConfig(**config)).settings, seed=5)


def masks(plan: MovingSchedule) -> list[list[bool]]:
    return [part.active.tolist() for part in plan.parts.values()]


def test_a_move_takes_the_weakest_adds_a_silent_one_and_keeps_the_sum_of_ranks() -> None:
    plan = schedule(warmup_steps=0, final_steps=0, interval=1, budget=1)
    before = [part(X) for part in plan.parts.values()]
    edits = plan.advance(1, 40, {})
    apply_edits(edits)
    assert masks(plan) == [[True, True, True], [True, True, False], [True, True, False], [True, False, False]]
    gained, lost = plan.parts["layer0"], plan.parts["layer3"]
    assert gained.lora_E.tolist() == [1, 1, 0] and lost.lora_E.tolist() == [1, 0, 0]
    after = [part(X) for part in plan.parts.values()]
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.equal(before[3], after[3])


def test_new_vectors_are_drawn_from_seed_layer_and_step_with_the_first_ones_spread() -> None:
    drawn = []
    for step in (1, 1, 2):
        plan = schedule(warmup_steps=0, final_steps=0, interval=1, budget=1)
        first = plan.parts["layer0"].lora_A.detach().clone()
        apply_edits(plan.advance(step, 40, {}))
        part = plan.parts["layer0"]
        assert torch.equal(part.lora_A[:2], first[:2]) and not torch.equal(part.lora_A[2], first[2])
        drawn.append(torch.cat([part.lora_A[2], part.lora_B[:, 2]]).detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 0.002 < float(drawn[0].std()) < 0.06


def test_layers_that_gain_in_one_step_gain_different_vectors() -> None:
    plan = schedule(warmup_steps=0, final_steps=0, interval=1, budget=2)
    apply_edits(plan.advance(1, 40, {}))
    first, second = (part for part in plan.parts.values() if all(part.active))
    assert not torch.equal(first.lora_A[2], second.lora_A[2])
    assert not torch.equal(first.lora_B[:, 2], second.lora_B[:, 2])


def test_unset_lengths_are_a_tenth_three_tenths_and_a_fiftieth_of_the_run() -> None:
    plan = schedule()
    assert [t for t in range(1, 301) if plan.reads_parameters(t, 300)] == list(range(36, 211, 6))
    assert [t for t in range(1, 11) if plan.reads_parameters(t, 10)] == list(range(2, 8))


def test_a_layer_whose_e_is_all_zero_puts_off_every_move() -> None:
    plan = schedule(warmup_steps=0, final_steps=0, interval=1)
    plan.parts["layer2"].lora_E.data.zero_()
    assert plan.advance(1, 40, {}) == [] and all(sum(mask) == 2 for mask in masks(plan))


def test_moves_happen_at_multiples_of_the_interval_between_the_phases() -> None:
    plan = schedule(warmup_steps=4, final_steps=10, interval=3, budget=8)
    moved = []
    for step in range(1, 41):
        for number, part in enumerate(plan.parts.values()):
            part.lora_E.data.copy_(torch.tensor([1.0, 0.1 + 0.1 * ((number + step) % 4), 0.05]))
        if plan.advance(step, 40, {}):
            moved.append(step)
        assert sum(map(sum, masks(plan))) == 8 and all(1 <= sum(mask) <= 3 for mask in masks(plan))
    assert moved and set(moved) <= set(range(6, 30, 3))


def test_the_masks_are_its_state() -> None:
    first, second = schedule(warmup_steps=0, interval=1, budget=1), schedule()
    first.advance(1, 40, {})
    assert first.state()["active"]["layer0"] == "111"
    second.restore(first.state(), {})
    assert masks(second) == masks(first) != masks(schedule())


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"warmup_steps is 1 and subspace\.options\.final_steps is 9, which leaves no step"
    ):
        schedule(final_steps=9).check(10)
    for steps in range(1, 40):
        schedule().check(steps)
