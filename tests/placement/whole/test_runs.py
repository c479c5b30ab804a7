"""Runs of `deepspeed.preset: none`: bit for bit those of ZeRO stage 0 on one rank, and each goes on where the other stopped."""

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
from tests.tiny_run import make_model, make_records
from tests.whole_runs import configuration, losses, run_here

STEPS = 6
# method, storage, dtype, and what else of the configuration: schedules that move within the steps, every optimizer of a CPU
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora on nf4, every gradient clipped": {"model.storage": "nf4", "training.max_grad_norm": 0.1},
    "dora on int8, sgd": {"subspace.method": "dora", "model.storage": "int8", "training.optim": "sgd"},
    "ssb in bfloat16, fused, no clipping": {
        "subspace.method": "ssb",
        "model.storage": "bf16",
        "training.optim": "adamw_torch_fused",
        "training.max_grad_norm": 0.0,
    },
    "prefix on fp8, adagrad": {"subspace.method": "prefix", "model.storage": "fp8", "training.optim": "adagrad"},
    "houlsby, rmsprop": {"subspace.method": "houlsby", "training.optim": "rmsprop"},
    "adalora": {
        "subspace.method": "adalora",
        "subspace.rank": 2,
        "subspace.options": {"init_rank": 4, "warmup_steps": 1, "final_steps": 2, "interval": 1},
    },
    "flexlora": {
        "subspace.method": "flexlora",
        "subspace.options": {"warmup_steps": 1, "final_steps": 1, "interval": 2, "budget": 60},
    },
    "lora-dash": {"subspace.method": "lora-dash", "subspace.options": {"warmup_steps": 2, "directions": 3}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    return path


def config(folder: Path, run: Path, preset: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Five micro-batches a step, dropout, weight decay, a schedule of the rate, checkpoints in the middle."""
    values = configuration(folder, run, max_steps=STEPS, warmup_steps=1, weight_decay=0.1)
    values["subspace"] = {"method": "lora", "dropout": 0.1}
    values["deepspeed"] = {"preset": preset}
    for name, value in (changes or {}).items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return values


def ended(run: Path) -> dict[str, Tensor]:
    """What the last checkpoint holds."""
    files = ("adapter_model.safetensors", "optimizer.safetensors")
    return {f"{n}: {key}": t for n in files for key, t in load_file(run / f"checkpoint-{STEPS}" / n).items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def metrics(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(x["loss"], x["grad_norm"], x["learning_rate"], x.get("penalty", 0.0)) for x in lines if "loss" in x]


def scheduled(run: Path) -> dict[str, Any]:
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return {key: state[key] for key in ("method", "schedule", "optimizer_steps", "loss_scaler", "samples")}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_plain_torch_is_bit_for_bit_that_of_zero_0_on_one_rank(
    case: str, folder: Path, tmp_path: Path
) -> None:
    for preset in ("none", "zero0"):
        assert run_on_ranks(1, run_here, config(folder, tmp_path / preset, preset, CASES[case])) == [EXIT_OK]
    none, zero = tmp_path / "none", tmp_path / "zero0"
    assert metrics(none) == metrics(zero) and len(metrics(none)) == STEPS
    assert differing(ended(none), ended(zero)) == []
    assert scheduled(none) == scheduled(zero)


def interrupted(whole: Path, run: Path) -> Path:
    """A copy of it as it was when it was killed in its last step."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    return run


@pytest.mark.parametrize("case", ["lora on nf4, every gradient clipped", "adalora", "lora-dash"])
def test_it_resumes_bit_for_bit_and_continues_under_zero_and_the_other_way_round(
    case: str, folder: Path, tmp_path: Path
) -> None:
    whole = {}
    for preset, ranks in (("none", 1), ("zero3", 2)):
        whole[preset] = tmp_path / preset
        values = config(folder, whole[preset], preset, CASES[case])
        assert run_on_ranks(ranks, run_here, values) == [EXIT_OK] * ranks
    for begun, then, ranks in (("none", "none", 1), ("none", "zero0", 1), ("none", "zero2", 2), ("zero3", "none", 1)):
        run = interrupted(whole[begun], tmp_path / f"{begun}-{then}")
        assert run_on_ranks(ranks, run_here, config(folder, run, then, CASES[case])) == [EXIT_OK] * ranks
        assert losses(run) == pytest.approx(losses(whole["none"]), rel=1e-4) and len(losses(run)) == STEPS
        if ranks == 1 and begun == "none":
            assert differing(ended(run), ended(whole["none"])) == [], then
        else:
            assert [line[2] for line in metrics(run)] == [line[2] for line in metrics(whole["none"])]
            assert scheduled(run)["optimizer_steps"] == STEPS


def test_two_ranks_are_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_on_ranks(2, run_here, config(folder, run, "none")) == [EXIT_USAGE] * 2
    message = (read_status(run) or {})["message"]
    assert message == (
        "deepspeed.preset is 'none', which trains on one process, but there are 2 ranks; accepted with several: zero0, zero1, "
        "zero2, zero3, zero3-hpz, zero2-offload, zero3-offload, zero3-nvme"
    )
