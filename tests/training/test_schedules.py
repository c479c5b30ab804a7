"""Whole runs of the methods with a schedule: resumed in the middle of it, on any number of ranks, at every ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from tests.ranks import run_on_ranks
from tests.whole_runs import configuration, losses, run_here

STEPS = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_rank": 4, "warmup_steps": 1, "final_steps": 3, "interval": 1},  # 14 layers: 56, 29 at step 6, 28
    "flexlora": {
        "warmup_steps": 1,
        "final_steps": 2,
        "interval": 2,
        "budget": 60,
    },  # moves: up to 5 at step 6, 1 at step 8
    "lora-dash": {"warmup_steps": 4, "directions": 3},
}


def config(folder: Path, run: Path, method: str, preset: str) -> dict[str, Any]:
    values = configuration(folder, run, max_steps=STEPS, global_batch_size=6, warmup_steps=0)
    values["subspace"] = {"method": method, "rank": 2, "dropout": 0.1, "options": OPTIONS[method]}
    values["checkpoint"] = {"save_steps": 6, "save_total_limit": 3}
    return values | {"deepspeed": {"preset": preset}}


_whole: dict[tuple[str, str, int], Path] = {}


def whole_run(folder: Path, method: str, preset: str, ranks: int) -> Path:
    """A run that was not interrupted, made once for the tests that ask for it; they copy what they change."""
    key = (method, preset, ranks)
    if key not in _whole or not _whole[key].is_relative_to(folder):
        run = folder / f"{method}-{preset}-{ranks}"
        assert run_on_ranks(ranks, run_here, config(folder, run, method, preset)) == [EXIT_OK] * ranks
        _whole[key] = run
    return _whole[key]


def interrupted(whole: Path, run: Path) -> Path:
    """A copy of it as it was when it was killed in its last step."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    return run


def end(run: Path) -> dict[str, Tensor]:
    tensors = {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors |= load_file(run / f"checkpoint-{STEPS}" / name)
    return tensors


def schedule_state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())["method"]


def decided(run: Path, step: int = STEPS) -> dict[str, list[bool]]:
    """Which triplets are left, or which inputs the directions look at; by tensor name."""
    adapter = load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")
    masks = {
        n: t if n.endswith("active") else t.flatten() != 0
        for n, t in adapter.items()
        if n.endswith((".active", "lora_E"))
    }
    signs = {n: t.abs().argmax(1) for n, t in adapter.items() if n.endswith("dash_V")}
    return {name: tensor.tolist() for name, tensor in (masks | signs).items()}


@pytest.mark.parametrize(
    ("method", "preset", "ranks"),
    [
        *(("adalora", "zero3", 2), ("flexlora", "zero1", 2), ("lora-dash", "zero2", 2), ("lora-dash", "zero0", 1)),
        *(
            pytest.param(method, preset, ranks, marks=pytest.mark.slow)
            for method, preset, ranks in (
                *(("adalora", "zero0", 1), ("adalora", "zero2", 2), ("flexlora", "zero0", 2), ("flexlora", "zero3", 2)),
                ("lora-dash", "zero3", 2),
            )
        ),
    ],
)
def test_a_run_resumed_in_the_middle_of_its_schedule_ends_bit_for_bit_alike(
    method: str, preset: str, ranks: int, folder: Path, tmp_path: Path
) -> None:
    first = whole_run(folder, method, preset, ranks)
    whole, curve, state = end(first), losses(first), schedule_state(first, STEPS)
    run = interrupted(first, tmp_path / "run")
    assert run_on_ranks(ranks, run_here, config(folder, run, method, preset)) == [EXIT_OK] * ranks
    assert losses(run) == curve and len(curve) == STEPS
    again = end(run)
    assert again.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert schedule_state(run, STEPS) == state
    check_end(method, run, state)


def check_end(method: str, run: Path, state: dict[str, Any]) -> None:
    """The schedule did what it is for, and it was in the middle of it at the checkpoint that was resumed from."""
    final, middle = decided(run), decided(run, 6)
    ranks = {name: sum(mask) for name, mask in final.items()}
    if method == "adalora":
        assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1
        assert sum(map(sum, middle.values())) == 29
    elif method == "flexlora":
        masks = {name.removesuffix(".lora_E"): m for name, m in final.items() if name.endswith("active")}
        assert sum(map(sum, masks.values())) == 2 * len(masks) and len({sum(m) for m in masks.values()}) > 1
        assert state["active"] != schedule_state(run, 6)["active"]
    else:
        assert state == {"phase": 2, "switched": 4, "begun": 4}
        assert (run / "checkpoint-3" / "MANIFEST.json").exists()  # what stands while step 4 decomposes
        strengths = [t for name, t in end(run).items() if name.endswith("dash_delta")]
        assert strengths and all(bool(t.any()) for t in strengths)


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_decisions_are_the_same_on_one_two_and_three_ranks_and_after_a_resume_on_another_number(
    method: str, folder: Path, tmp_path: Path
) -> None:
    alone = whole_run(folder, method, "zero0", 1)
    for ranks, preset in ((2, "zero1" if method == "flexlora" else "zero2"), (3, "zero3")):
        run = whole_run(folder, method, preset, ranks)
        assert decided(run) == decided(alone)
        assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert decided(alone)
    run = interrupted(alone, tmp_path / "run")
    assert run_on_ranks(3, run_here, config(folder, run, method, "zero3")) == [EXIT_OK] * 3
    assert decided(run) == decided(alone)


def test_lengths_that_do_not_fit_are_refused_before_a_model_is_read(folder: Path, tmp_path: Path) -> None:
    values = config(folder, tmp_path / "run", "adalora", "zero0")
    values["subspace"]["options"] = {"warmup_steps": 9}
    values["model"]["path"] = str(folder / "model")
    assert run_here(values) == EXIT_USAGE
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "refused"
    assert (
        "warmup_steps is 9 and subspace.options.final_steps is 3, which leaves no step of max_steps 12"
        in status["message"]
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
