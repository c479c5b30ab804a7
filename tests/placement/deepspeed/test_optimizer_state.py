"""The optimizer holds exactly what is trained; its state is read and written by name, at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, advance, attach, load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.deepspeed.engine import DeepSpeedEngine
from dist_subspace.placement.deepspeed.optimizer_state import (
    plain_optimizer,
    read_state,
    state_keys,
    step_count,
    write_state,
)
from dist_subspace.placement.edits import apply_edits, restart_counters, set_counters
from dist_subspace.placement.stepped import watch_optimizers
from dist_subspace.placement.tensors import full_numel, gathered
from dist_subspace.subspace import Edit, attached, named_trainables, parameter_groups, trainable_parameters
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.engine import Stepper
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def trained_model(folder: str, stage: int, *, method: str = "lora", seed: int = 0, dtype: str = "float32") -> nn.Module:
    model = load_frozen(folder, storage="nf4", dtype=dtype, deepspeed=tiny.ds_config(stage, world_size=world().size))
    return attach(model, SubspaceConfig(method=method, rank=3, seed=seed)).train()


def engine_of(model: nn.Module, stage: int, **sections: Any) -> Any:
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    return tiny.make_engine(model, tiny.ds_config(stage, trainable_numel=trained, world_size=world().size) | sections)


def steps(engine: Any, first: int, last: int) -> list[float]:
    return [tiny.train_step(engine, tiny.own_batch(s, world().rank, world().size)) for s in range(first, last)]


# What the optimizer holds.


def optimizer_facts(folder: str, stage: int, bf16: bool) -> dict[str, int]:
    """Over all ranks: trained elements, bytes of masters and moments, and what the engine's optimizer was given."""
    model = trained_model(folder, stage, dtype="bfloat16" if bf16 else "float32")
    engine = engine_of(model, stage, **({"bf16": {"enabled": True}} if bf16 else {}))
    steps(engine, 0, 1)
    trainables = named_trainables(model)
    state = plain_optimizer(engine).state
    moments = sum(t.numel() * t.element_size() for s in state.values() for t in s.values() if _is_moment(t))
    own = {id(p) for p in trainables.values()}
    given = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    facts = {
        "trained": sum(full_numel(p) for p in trainables.values()),
        "parameters": len(trainables),
        "masters": sum(gather_objects(sum(p.numel() * p.element_size() for p in state))),
        "moments": sum(gather_objects(moments)),
        "own_parameters_given": len(given & own),
        "frozen_given": len(given & {id(p) for p in model.parameters() if not p.requires_grad}),
        "frozen_with_gradient": sum(p.grad is not None for p in model.parameters() if not p.requires_grad),
    }
    engine.destroy()
    return facts


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def check_optimizer_bytes(facts: dict[str, int], stage: int, ranks: int) -> None:
    copies = ranks if stage == 0 else 1  # at stage 0 every rank keeps all
    aligned = facts["trained"] + ranks * (facts["parameters"] + 8)
    assert 4 * facts["trained"] * copies <= facts["masters"] <= 4 * aligned * copies
    assert 8 * facts["trained"] * copies <= facts["moments"] <= 8 * aligned * copies


@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_bytes_are_12_for_each_trained_parameter_at_every_stage(llama: str, stage: int) -> None:
    """fp32 master (at stage 0 the parameter itself) and two moments, over all ranks, but for alignment."""
    check_optimizer_bytes(run_on_ranks(2, optimizer_facts, llama, stage, False)[0], stage, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_bf16_engine_allocates_no_fp32_copy_of_a_frozen_parameter(llama: str, stage: int) -> None:
    facts = run_on_ranks(2, optimizer_facts, llama, stage, True)[0]
    aligned = facts["trained"] + 2 * (facts["parameters"] + 8)
    copies = 2 if stage == 0 else 1
    assert facts["masters"] + facts["moments"] <= 12 * aligned * copies


@pytest.mark.parametrize("stage", STAGES)
def test_no_frozen_parameter_is_in_the_optimizer(llama: str, stage: int) -> None:
    for facts in run_on_ranks(2, optimizer_facts, llama, stage, False):
        assert facts["frozen_given"] == 0 and facts["frozen_with_gradient"] == 0
        if stage == 0:
            assert facts["own_parameters_given"] == facts["parameters"]


def scheduled_rates(folder: str, stage: int, method: str) -> tuple[int, list[float]]:
    """Groups as we make them, with weight decay, and a scheduler that DeepSpeed steps after the optimizer."""
    import deepspeed

    model = trained_model(folder, stage, method=method)
    groups = parameter_groups(model, tiny.RATE, weight_decay=0.1)
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=tiny.RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = tiny.ds_config(stage, trainable_numel=1, world_size=world().size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    steps(engine, 0, 2)
    found = (len(groups), [group["lr"] for group in engine.optimizer.param_groups])
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["lora", "ssl"])
def test_no_group_is_empty_and_a_scheduler_makes_its_first_steps(llama: str, stage: int, method: str) -> None:
    for count, rates in run_on_ranks(2, scheduled_rates, llama, stage, method):
        assert rates == pytest.approx([tiny.RATE / 3] * count)


# Reading and writing it by name.


def primed(engine: Any) -> None:
    """The moments made by the training loop's own step with zero gradients."""
    ids = tiny.own_batch(0, world().rank, world().size)
    micro = MicroBatch(inputs={"input_ids": ids}, labels=ids, number=0, targets=1, samples=len(ids), tokens=ids.numel())
    batch = GlobalBatch(0, [micro], micro, targets=1, samples=len(ids), tokens=ids.numel(), epoch=0.0)
    Stepper(DeepSpeedEngine(engine), torch.device("cpu"), 0, world().size).prime(batch)


def six_steps(folder: str, stage: int) -> dict[str, Any]:
    """Losses of six steps, the state after three (on the main rank), and the final trained values."""
    engine = engine_of(trained_model(folder, stage), stage)
    losses = steps(engine, 0, 3)
    state, count = read_state(engine, named_trainables(engine.module)), step_count(engine)
    losses += steps(engine, 3, 6)
    final = read_state(engine, named_trainables(engine.module))
    engine.destroy()
    return {"losses": losses, "state": state, "count": count, "final": final}


def continued(folder: str, stage: int, stored: str, count: int) -> dict[str, Any]:
    """Steps 3 to 6 of a fresh engine, whose adapter began elsewhere, from a stored state."""
    engine = engine_of(trained_model(folder, stage, seed=77), stage)
    primed(engine)
    write_state(engine, named_trainables(engine.module), load_file(stored), count)
    back = read_state(engine, named_trainables(engine.module))
    losses = steps(engine, 3, 6)
    final = read_state(engine, named_trainables(engine.module))
    engine.destroy()
    return {"losses": losses, "back": back, "final": final}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stored_state_continues_bit_for_bit(llama: str, tmp_path: Path, stage: int, ranks: int) -> None:
    whole = run_on_ranks(ranks, six_steps, llama, stage)
    save_file(whole[0]["state"], tmp_path / "state.safetensors")
    again = run_on_ranks(ranks, continued, llama, stage, str(tmp_path / "state.safetensors"), whole[0]["count"])
    assert whole[0]["count"] == 3
    for first, second in zip(whole, again, strict=True):
        assert_same(second["back"], whole[0]["state"])
        assert second["losses"] == first["losses"][3:]
        assert_same(second["final"], first["final"])


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize(("first", "second"), [(3, 3), (1, 3), (3, 0), (0, 2)])
def test_a_state_of_two_ranks_continues_on_one_and_at_another_stage(
    llama: str, tmp_path: Path, first: int, second: int
) -> None:
    whole = run_on_ranks(2, six_steps, llama, first)
    save_file(whole[0]["state"], tmp_path / "state.safetensors")
    again = run_on_ranks(1, continued, llama, second, str(tmp_path / "state.safetensors"), whole[0]["count"])[0]
    mean = [(a + b) / 2 for a, b in zip(whole[0]["losses"], whole[1]["losses"], strict=True)]
    assert again["losses"] == pytest.approx(mean[3:], rel=1e-4)


def names_and_primed(folder: str, stage: int) -> dict[str, Any]:
    """State before any step, and what the step with zero gradients does to what is trained."""
    engine = engine_of(trained_model(folder, stage), stage)
    none_yet = state_keys(engine)
    before = {n: t.clone() for n, t in read_state(engine, named_trainables(engine.module)).items()}
    primed(engine)
    after = read_state(engine, named_trainables(engine.module))
    shapes = dict(engine.module.subspace.shapes)
    result = {"before": before, "after": after, "none_yet": none_yet, "keys": state_keys(engine), "shapes": shapes}
    engine.destroy()
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_priming_makes_the_moments_and_moves_nothing(llama: str, stage: int) -> None:
    for rank in run_on_ranks(2, names_and_primed, llama, stage):
        assert rank["none_yet"] == [] and rank["keys"] == ["exp_avg", "exp_avg_sq"]
        for name, shape in rank["shapes"].items():
            assert tuple(rank["after"][f"{name}.exp_avg"].shape) == shape
            assert not rank["after"][f"{name}.exp_avg"].any() and not rank["after"][f"{name}.exp_avg_sq"].any()
            assert torch.equal(rank["after"][f"{name}.master"], rank["before"][f"{name}.master"])


def state_in_two_groups(folder: str, stage: int) -> dict[str, Tensor]:
    """DeepSpeed 0.19.8 loses sight of the moments of every group but the first at stages 1 and 2."""
    import deepspeed

    model = trained_model(folder, stage)
    trainables = named_trainables(model)
    groups = [[p for name, p in trainables.items() if name.endswith(own)] for own in ("lora_A", "lora_B")]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=tiny.RATE)
    config = tiny.ds_config(stage, trainable_numel=1, world_size=world().size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    steps(engine, 0, 2)
    state = read_state(engine, trainables)
    changed = {name: 2 * tensor for name, tensor in state.items()}
    write_state(engine, trainables, changed, 2)
    assert_same(read_state(engine, trainables), changed)
    engine.destroy()
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_of_every_parameter_group_is_read_and_written(llama: str, stage: int) -> None:
    for state in run_on_ranks(2, state_in_two_groups, llama, stage):
        assert all(state[name].any() for name in state if ".exp_avg" in name and "lora_B" in name)


# Edits in the middle of training.

NAME = "model.layers.1.self_attn.k_proj.lora_"  # A is 3 x 45: no number of ranks divides it


def edited(folder: str, stage: int, bf16: bool) -> dict[str, Any]:
    """The whole state after two steps, and after edits of one parameter's row and another's column; then one more step."""
    model = trained_model(folder, stage, method="adalora", dtype="bfloat16" if bf16 else "float32")
    engine = engine_of(model, stage, **({"bf16": {"enabled": True}} if bf16 else {}))
    steps(engine, 0, 2)
    trainables = named_trainables(model)
    before = read_state(engine, trainables)
    a, b = trainables[f"{NAME}A"], trainables[f"{NAME}B"]
    first, second = torch.arange(5)[:, None] == 1, torch.arange(5)[None] == 2
    apply_edits([Edit(a, first, torch.arange(45.0)[None], moments=True), Edit(b, second, 0.25)])
    after = read_state(engine, trainables)
    with gathered(trainables.values()):
        read = {name: p.detach().float().clone() for name, p in trainables.items()}
    losses = steps(engine, 2, 3)
    with gathered(trainables.values()):
        stepped = {name: p.detach().float().clone() for name, p in trainables.items()}
    engine.destroy()
    return {"before": before, "after": after, "read": read, "stepped": stepped, "losses": losses}


@pytest.mark.parametrize(("stage", "bf16"), [(stage, bf16) for bf16 in (False, True) for stage in STAGES])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_edit_reaches_parameter_master_and_moments_and_nothing_else(
    llama: str, stage: int, ranks: int, bf16: bool
) -> None:
    for rank in run_on_ranks(ranks, edited, llama, stage, bf16):
        expected = {name: tensor.clone() for name, tensor in rank["before"].items()}
        expected[f"{NAME}A.master"][1] = torch.arange(45.0)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert expected[f"{NAME}A.{moment}"][1].any()
            expected[f"{NAME}A.{moment}"][1] = 0
        expected[f"{NAME}B.master"][:, 2] = 0.25
        assert_same(rank["after"], expected)
        for name, value in rank["read"].items():
            torch.testing.assert_close(value, expected[f"{name}.master"], rtol=8e-3 if bf16 else 0, atol=0)
        moved = rank["stepped"][f"{NAME}A"][1] - torch.arange(45.0)
        assert float(moved.abs().max()) < (
            0.2 if bf16 else 0.011
        )  # one step on from the edited master, not from the old one


def refused_at_stage_0(folder: str) -> str:
    import deepspeed

    model = trained_model(folder, 0, method="adalora", dtype="bfloat16")
    config = tiny.ds_config(0, trainable_numel=1, world_size=world().size) | {"bf16": {"enabled": True}}
    optimizer = torch.optim.AdamW(parameter_groups(model, tiny.RATE), lr=tiny.RATE)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config
    )  # another loop's, not start_engine
    steps(engine, 0, 1)
    with pytest.raises(UsageError) as error:
        advance(engine.module, 1, 10)
    engine.destroy()
    return str(error.value)


def test_masters_that_cannot_be_found_are_refused_at_once(llama: str) -> None:
    assert "float32 copies of bfloat16 parameters" in run_on_ranks(1, refused_at_stage_0, llama)[0]


def counters(engine: Any) -> list[int]:
    return sorted({int(state["step"]) for state in plain_optimizer(engine).state.values()})


def restarted(folder: str, stage: int, own_groups: bool) -> dict[str, Any]:
    """The optimizer's counters when LoRA-Dash's strengths begin after three steps, and after a fourth."""
    import deepspeed

    model = trained_model(folder, stage, method="lora-dash")
    groups = parameter_groups(model, tiny.RATE) if own_groups else trainable_parameters(model)
    config = tiny.ds_config(stage, trainable_numel=1, world_size=world().size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=tiny.RATE), config=config)
    steps(engine, 0, 3)
    late = attached(model).schedule.late_parameters()  # type: ignore[union-attr]
    mine = {id(p) for p in late}
    begun = restart_counters(late, [p for p in trainable_parameters(model) if id(p) not in mine])
    found = {"begun": begun, "then": counters(engine)}
    steps(engine, 3, 4)
    found |= {"later": counters(engine)}
    set_counters(late, 7)
    found |= {"set": counters(engine)}
    engine.destroy()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trained_later_is_counted_from_there_on(llama: str, stage: int, ranks: int) -> None:
    for found in run_on_ranks(ranks, restarted, llama, stage, True):
        assert found == {"begun": 3, "then": [0, 3], "later": [1, 4], "set": [4, 7]}


def test_counters_shared_with_other_parameters_are_left_alone(llama: str) -> None:
    for stage in (1, 2, 3):
        found = run_on_ranks(2, restarted, llama, stage, False)[0]
        assert found["begun"] is None and found["then"] == [3] and found["later"] == [4]
    assert run_on_ranks(2, restarted, llama, 0, False)[0]["then"] == [0, 3]  # unsplit, each parameter has its own


def test_an_8_bit_moment_becomes_zero_by_its_table() -> None:
    """bitsandbytes keeps codes: the place of zero in the table is not code 0."""
    parameter = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    watch_optimizers()
    parameter.grad = torch.zeros(8)
    optimizer.step()
    table = torch.linspace(-1, 1, 256).index_fill(0, torch.tensor([127]), 0.0)
    codes = torch.full((8,), 200, dtype=torch.uint8)
    optimizer.state[parameter] = {"state1": codes, "qmap1": table, "absmax1": torch.ones(2), "step": 1}
    apply_edits([Edit(parameter, torch.arange(8) < 2, 0.0, moments=True)])
    assert codes.tolist() == [127, 127] + [200] * 6
    assert torch.equal(optimizer.state[parameter]["absmax1"], torch.ones(2))
    assert parameter.tolist() == [0, 0] + [1] * 6
