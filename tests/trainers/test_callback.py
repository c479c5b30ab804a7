"""A schedule moves on under somebody's trainer, and lengths that do not fit are said before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached
from tests.trainers import bench


def test_adalora_ends_at_its_target_under_trl(base: Path, tmp_path: Path) -> None:
    options = {"warmup_steps": 1, "final_steps": 1, "interval": 1}
    trainer = bench.made("SFTTrainer", base, tmp_path, method="adalora", options=options, max_steps=5)
    trainer.train()
    parts = [trainer.model.get_submodule(name) for name in attached(trainer.model).layers]
    kept = [int((part.lora_E != 0).sum()) for part in parts]
    assert sum(kept) == 4 * len(kept) and len(set(kept)) > 1


def test_lengths_that_do_not_fit_are_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    trainer = bench.made("SFTTrainer", base, tmp_path, method="adalora", options={"warmup_steps": 4, "final_steps": 4})
    before = bench.values(trainer.model)
    with pytest.raises(UsageError, match="leaves no step of max_steps 4 between"):
        trainer.train()
    assert all((value == before[name]).all() for name, value in bench.values(trainer.model).items())
