"""The steps of Trainer that have no public name are still there, and called as they were."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers

from dist_subspace.trainers import trainer_internals
from dist_subspace.trainers.trainer_internals import CheckpointSteps
from tests.tiny_models import tiny_model

STEPS = [name for name in vars(CheckpointSteps) if name.startswith("_") and not name.startswith("__")]


def test_every_step_is_one_of_trainers_and_takes_the_same() -> None:
    assert len(STEPS) == 7
    for name in STEPS:
        theirs, ours = (
            inspect.signature(getattr(transformers.Trainer, name)),
            inspect.signature(vars(CheckpointSteps)[name]),
        )
        if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in ours.parameters.values()):
            assert list(ours.parameters) == list(theirs.parameters), name


@pytest.mark.parametrize("name", STEPS)
def test_trainer_calls_the_step(name: str) -> None:
    assert f"self.{name}(" in inspect.getsource(transformers.Trainer)


def test_frozen_weights_are_left_out_under_all_their_names_and_not_missed() -> None:
    model = tiny_model()  # whose head is tied to the embedding
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with trainer_internals._frozen_left_out(model):
        state = model.state_dict()
    assert list(state) == ["model.norm.weight"] and len(model.state_dict()) > 10
    with trainer_internals._frozen_not_missed(model):
        model.load_state_dict({"model.norm.weight": torch.ones(32)}, strict=True)
    assert (model.model.norm.weight == 1).all()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state, strict=True)


def test_the_versions_that_were_read_are_the_ones_in_the_constraints() -> None:
    constraints = (Path(__file__).parents[2] / "launch" / "constraints.txt").read_text(encoding="utf-8")
    assert "\ntrl==1.16.0\n" in constraints and "\ntransformers==5.23.0\n" in constraints
