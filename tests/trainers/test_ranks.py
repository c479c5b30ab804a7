"""Trainers on two ranks: with ZeRO, whose engine writes checkpoints of its own, and without DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dist_subspace as dsub
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import gathered
from tests.placement import hf_trainer as hf
from tests.ranks import run_on_ranks
from tests.trainers import bench

STEPS = 4
SCHEDULES: dict[str, dict[str, Any]] = {
    "adalora": {"warmup_steps": 1, "final_steps": 1, "interval": 1},
    "lora-dash": {"warmup_steps": 1, "directions": 2},
}


def run(trainer: str, base: str, out: str, method: str, stage: int | None, resume: bool = False, **changes: Any) -> Any:
    """A training of four steps on two rows a rank."""
    hf.forget_earlier_trainers()
    settings = {"deepspeed": hf.stock(stage)} if stage is not None else {}
    options = SCHEDULES.get(method, {})
    rank = 4 if dsub.methods()[method].uses_rank else None
    made = bench.made(
        trainer,
        base,
        out,
        method=method,
        rank=rank,
        options=options,
        storage="nf4",
        max_steps=STEPS,
        **{"per_device_train_batch_size": 4 // world().size, **settings, **changes},
    )
    made.train(resume_from_checkpoint=resume or None)
    return made


def facts(made: Any) -> dict[str, Any]:
    with gathered(dsub.trainable_parameters(made.model)):
        return {"losses": bench.losses(made), "values": bench.values(made.model)}


def whole_and_resumed(trainer: str, base: str, out: str, method: str, stage: int | None) -> dict[str, Any]:
    """A run, and one that goes on from the middle; what is in the middle's checkpoint; what its adapter computes."""
    whole = facts(run(trainer, base, f"{out}/whole", method, stage))
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = run(trainer, base, f"{out}/half", method, stage, **saving)
    split = any(is_partitioned(p) for p in first.model.parameters())
    torch.distributed.barrier()
    if world().is_main:
        shutil.rmtree(f"{out}/half/checkpoint-{STEPS}")
    torch.distributed.barrier()
    made = run(trainer, base, f"{out}/half", method, stage, resume=True, **saving)
    made.save_model(f"{out}/saved")
    resumed, written = facts(made), adapter_tensors(made.model)
    hf.forget_earlier_trainers()
    torch.distributed.barrier()
    task = {"task": "classification", "num_labels": 1} if trainer in bench.MODELS else {}
    plain = dsub.load_adapter(dsub.load_frozen(base, storage="nf4", dtype="float32", **task), f"{out}/saved")
    frozen = {name for name, p in plain.named_parameters(remove_duplicate=False) if not p.requires_grad}
    read = adapter_tensors(plain)
    return {
        **{"whole": whole, "resumed": resumed, "written": written, "read": read},
        **{"split": split, "frozen": frozen},
    }


def check(trainer: str, method: str, stage: int | None, folder: Path) -> list[float]:
    base = bench.save_base(folder / "base", trainer)
    ranks = run_on_ranks(2, whole_and_resumed, trainer, str(base), str(folder), method, stage)
    for found in ranks:
        assert found["whole"]["losses"] == found["resumed"]["losses"]
        assert found["split"] == (stage == 3)
        for name, value in found["whole"]["values"].items():
            assert torch.equal(value, found["resumed"]["values"][name]), name
        assert found["written"].keys() <= ranks[0]["read"].keys()
        for name, value in found["written"].items():  # of scalings the file has 1 + l, which rounds
            torch.testing.assert_close(value, ranks[0]["read"][name], rtol=0, atol=1e-6)
    check_files(folder / "half" / "checkpoint-2", ranks[0]["frozen"])
    losses: list[float] = ranks[0]["whole"]["losses"]
    return losses


def check_files(checkpoint: Path, frozen: set[str]) -> None:
    """No file of a checkpoint has a frozen parameter of the base under any of its names."""
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names = {name.removeprefix("base_model.model.").removeprefix("value.") for name in handle.keys()}  # noqa: SIM118
        assert not names & frozen, file
    for file in checkpoint.rglob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        assert not set(state["module"]) & frozen
        assert not state.get("frozen_param_fragments") and not state.get("frozen_param_shapes")


@pytest.mark.parametrize(
    ("trainer", "method", "stage"),
    [("DPOTrainer", "lora", 3), pytest.param("SFTTrainer", "adalora", 2, marks=pytest.mark.slow)],
)
def test_on_two_ranks_a_resumed_training_is_the_whole_one_and_checkpoints_hold_the_adapter_alone(
    trainer: str, method: str, stage: int, tmp_path: Path
) -> None:
    losses = check(trainer, method, stage, tmp_path)
    if trainer == "DPOTrainer":
        assert losses[0] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(
    ("trainer", "method"),
    [
        ("SFTTrainer", "lora"),
        ("SFTTrainer", "lora-dash"),
        ("DPOTrainer", "ssb"),
        ("KTOTrainer", "adalora"),
        ("RewardTrainer", "ia3"),
    ],
)
def test_every_trainer_and_stage(trainer: str, method: str, stage: int | None, tmp_path: Path) -> None:
    check(trainer, method, stage, tmp_path)
