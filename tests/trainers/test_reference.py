"""The reference of a preference is the model with its adapter off: no second model is loaded, whatever the policy has become."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.trainers.reference import Reference, ReferenceChoice
from tests.trainers import bench


def models() -> int:
    gc.collect()
    return sum(isinstance(thing, transformers.PreTrainedModel) for thing in gc.get_objects())


def test_no_second_model_is_made(base: Path, tmp_path: Path) -> None:
    before = models()
    trainer = bench.made("DPOTrainer", base, tmp_path, storage="nf4")
    assert models() - before <= 2  # the model, and its stack of blocks
    assert isinstance(trainer.ref_model, Reference) and trainer.ref_model.model is trainer.model


def test_log_probabilities_of_the_reference_are_those_of_the_base_after_a_training(base: Path, tmp_path: Path) -> None:
    trainer = bench.made("DPOTrainer", base, tmp_path, max_steps=2, learning_rate=0.1)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    before = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.model, batch)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    for found in (before, after):
        torch.testing.assert_close(torch.cat(found), picked.sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["DPOTrainer", "KTOTrainer"])
def test_references_that_are_computed_first_give_the_same_losses(trainer: str, base: Path, tmp_path: Path) -> None:
    made = [bench.made(trainer, base, tmp_path, precompute_ref_log_probs=early, max_steps=2) for early in (False, True)]
    for one in made:
        one.train()
    assert bench.losses(made[0]) == pytest.approx(bench.losses(made[1]), rel=1e-6)


def test_a_loaded_adapter_is_its_own_reference_when_that_is_computed_first(base: Path, tmp_path: Path) -> None:
    first = dsub.attach(dsub.load_frozen(base, storage="fp32"), dsub.SubspaceConfig(rank=2))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(first):
            parameter.add_(0.1)
    dsub.save_adapter(first, tmp_path / "adapter")
    model = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), tmp_path / "adapter")
    args = bench.arguments("DPOTrainer", tmp_path, precompute_ref_log_probs=True, max_steps=1)
    trainer = bench.on("DPOTrainer", model, base, args)
    trainer.train()
    assert bench.losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-6)
    with pytest.raises(dsub.errors.UsageError, match="has been trained since"):  # type: ignore[attr-defined]
        trainer.evaluate(bench.samples("DPOTrainer", 4))


def test_a_trainer_that_makes_a_model_its_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="made a second model of class Linear its reference"):
        ReferenceChoice().ref_model = torch.nn.Linear(2, 2)  # type: ignore[assignment]
