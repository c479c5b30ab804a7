"""TRL turns dropout off for preferences: that of a method's branch too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from tests.trainers import bench


@pytest.mark.parametrize("disabled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_disable_dropout_reaches_the_methods_branch(disabled: bool, base: Path, tmp_path: Path) -> None:
    trainer = bench.made("DPOTrainer", base, tmp_path, attach={"dropout": 0.5}, disable_dropout=disabled)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(trainer.model):
            parameter.add_(0.1)
    model, ids = trainer.model.train(), batch["input_ids"]
    assert (model(ids).logits == model(ids).logits).all().item() == disabled
