"""Moments in 8 bits come back bit by bit at every ZeRO stage, and as numbers where the blocks are cut otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.optimizer_state import plain_optimizer, read_state, step_count, write_state
from dist_subspace.subspace import named_trainables, parameter_groups, trainable_parameters
from dist_subspace.training.optimizers import AdamSettings, make_optimizer
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model

SETTINGS = AdamSettings(1e-2, 0.9, 0.999, 1e-8)


def engine_of(folder: str, optim: str, stage: int) -> tuple[Any, Any]:
    """Matrices above and below the 4096 elements from which on bitsandbytes uses 8 bits (its kernels run on CPUs too)."""
    size = world().size
    model = load_frozen(folder, storage="nf4", dtype="float32", deepspeed=tiny.ds_config(stage, world_size=size))
    targets = ["q_proj", "k_proj", "down_proj"]
    attach(model, SubspaceConfig(method="lora", rank=32, target_modules=targets)).train()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainable_parameters(model))
    config = tiny.ds_config(stage, trainable_numel=trained, world_size=size)
    made = lambda parameters, lr: make_optimizer(optim, parameter_groups(model, lr, 0.0), SETTINGS)  # noqa: E731
    return tiny.make_engine(model, config, made), model


def there_and_back(folder: str, optim: str, stage: int) -> dict[str, Any]:
    engine, model = engine_of(folder, optim, stage)
    rank, size = world().rank, world().size
    named = named_trainables(model)
    for number in range(3):
        tiny.train_step(engine, tiny.own_batch(number, rank, size))
    inner = plain_optimizer(engine).state
    packed = [t.clone() for s in inner.values() for t in s.values() if isinstance(t, torch.Tensor)]
    saved = read_state(engine, named)
    first = tiny.train_step(engine, tiny.own_batch(3, rank, size)), read_state(engine, named)
    write_state(engine, named, saved, 3)
    again = [t.clone() for s in inner.values() for t in s.values() if isinstance(t, torch.Tensor)]
    found = {
        "saved": saved,
        "codes": sum(t.dtype == torch.uint8 for t in packed),
        "same": len(packed) == len(again) and all(map(torch.equal, packed, again)),
        "steps": step_count(engine),
        "bytes": sum(t.numel() * t.element_size() for t in saved.values()),
    }
    second = tiny.train_step(engine, tiny.own_batch(3, rank, size)), read_state(engine, named)
    found["next"] = first[0] == second[0] and all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    engine.destroy()
    return found


def taken_up(folder: str, optim: str, stage: int, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another engine with that state."""
    engine, model = engine_of(folder, optim, stage)
    named = named_trainables(model)
    tiny.train_step(engine, tiny.own_batch(0, world().rank, world().size))
    write_state(engine, named, saved, 3)
    found = read_state(engine, named)
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "wide", width=128))


@pytest.fixture(scope="module")
def unsplit(wide: str) -> dict[str, Any]:
    return run_on_ranks(1, there_and_back, wide, "adamw_bnb_8bit", 0)[0]


def check(found: dict[str, Any], moments: int) -> None:
    assert found["codes"] > 0, "nothing is held in 8 bits: the test asks nothing"
    assert found["same"], "codes or magnitudes changed by being stored and read"
    assert found["next"], "the step after is another one"
    assert found["steps"] == 3
    numel = sum(t.numel() for key, t in found["saved"].items() if key.endswith(".master"))
    assert found["bytes"] <= (4 + 4 * moments + 0.2) * numel


@pytest.mark.parametrize(("optim", "moments"), [("adamw_bnb_8bit", 2), ("lion_8bit", 1)])
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (3, 2)])
def test_moments_in_8_bits_come_back_bit_by_bit(optim: str, moments: int, stage: int, ranks: int, wide: str) -> None:
    for found in run_on_ranks(ranks, there_and_back, wide, optim, stage):
        check(found, moments)


def test_moments_of_an_unsplit_optimizer_are_its_own_numbers(unsplit: dict[str, Any]) -> None:
    """By bitsandbytes' own dequantiser: a moment is a table's entry times its block's magnitude."""
    check(unsplit, 2)
    assert any(key.endswith(".scale1") for key in unsplit["saved"])


def test_an_optimizer_whose_blocks_are_cut_otherwise_takes_the_numbers_up(unsplit: dict[str, Any], wide: str) -> None:
    """Split over two ranks, and in 32 bits: the first rounds once more, by half a step of its table; the second not at all."""
    saved = unsplit["saved"]
    for optim, tolerance in (("adamw_bnb_8bit", 0.02), ("paged_adamw_32bit", 0.0)):
        found = run_on_ranks(2, taken_up, wide, optim, 1, saved)[0]
        for key in (key for key in saved if key.endswith((".master", ".state1", ".state2"))):
            largest = float(saved[key].abs().max())
            assert float((found[key] - saved[key]).abs().max()) <= (tolerance * largest if "state" in key else 0.0), key


def test_numbers_of_one_tensor_are_those_of_bitsandbytes() -> None:
    from bitsandbytes import functional
    from bitsandbytes.optim import AdamW8bit

    from dist_subspace.placement.eight_bit import unpacked

    weight = torch.nn.Parameter(torch.randn(70, 100, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.grad = torch.randn(70, 100, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    state = optimizer.state[weight]
    expected = functional.dequantize_blockwise(
        state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256
    )
    with unpacked(optimizer.state, rewritten=False):
        torch.testing.assert_close(state["state1"], expected, rtol=1e-6, atol=0)
        assert state["state1"].dtype == torch.float32
    assert state["state1"].dtype == torch.uint8 and "scale1" not in state


def test_run_lengths_hold_the_magnitudes(tmp_path: Path) -> None:
    from dist_subspace.placement.eight_bit import lengthened, shortened

    scales = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.0]).view(2, 3)
    short = shortened("w.scale1", scales)
    assert short["w.scale1"].tolist() == [0.5, 0.25, 0.0] and short["w.scale1.counts"].tolist() == [2, 3, 1]
    assert torch.equal(lengthened("w.scale1", short, scales), scales)
    assert torch.equal(lengthened("w.scale2", short, scales), torch.zeros(2, 3))
