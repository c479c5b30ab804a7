"""A checkpoint's own file: what belongs to another model is refused, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.trainers.state import restore_schedule, restore_values, save_state
from tests.tiny_models import tiny_model


def attached_model(rank: int = 2, method: str = "lora", seed: int = 0) -> torch.nn.Module:
    return dsub.attach(tiny_model(), dsub.SubspaceConfig(method=method, rank=rank, seed=seed))


def saved(model: torch.nn.Module, folder: Path) -> Path:
    dsub.save_adapter(model, folder)
    save_state(model, folder)
    return folder


def test_another_rank_and_a_folder_without_the_file_are_refused(tmp_path: Path) -> None:
    folder = saved(attached_model(), tmp_path / "one")
    with pytest.raises(UsageError, match=r"lora_A as \(2, 44\), and the model as \(3, 44\)"):
        restore_values(attached_model(3), folder)
    (folder / "subspace_state.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no subspace_state.safetensors; accepted: a checkpoint that a trainer"):
        restore_values(attached_model(), folder)


def test_frozen_factors_that_came_out_otherwise_are_refused(tmp_path: Path) -> None:
    """LoRA-FA's A is drawn from the seed and frozen: with another one the trained B means something else."""
    folder = saved(attached_model(method="lora-fa"), tmp_path / "one")
    other = attached_model(method="lora-fa", seed=1)
    restore_values(other, folder)
    with pytest.raises(UsageError, match=r"holds another .*lora_A.* than the model has after it was read"):
        restore_schedule(other, folder)
    same = attached_model(method="lora-fa")
    restore_values(same, folder)
    restore_schedule(same, folder)
