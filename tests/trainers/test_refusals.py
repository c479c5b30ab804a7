"""What cannot be right under somebody's trainer is refused before it is made, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from trl.experimental import orpo

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.trainers.refusals import check_head, trainer_of_trl
from tests.tiny_models import tiny_model
from tests.trainers import bench


@pytest.mark.parametrize(
    ("trainer", "changes", "sentence"),
    [
        ("DPOTrainer", {"keywords": {"ref_model": tiny_model()}}, "ref_model is given, but the reference is"),
        ("DPOTrainer", {"sync_ref_model": True}, "sync_ref_model is on"),
        (
            "SFTTrainer",
            {"keywords": {"peft_config": object()}},
            "peft_config is given, and the model has a method already",
        ),
        ("SFTTrainer", {"load": {"head_storage": "nf4"}, "storage": "nf4"}, "which is held as nf4, in packed bytes"),
        (
            "DPOTrainer",
            {"attach": {"target_modules": ["q_proj", "lm_head"]}},
            "DPOTrainer multiplies by the weight of lm_head instead of calling it, which has method lora",
        ),
        ("KTOTrainer", {"attach": {"modules_to_save": ["lm_head"]}}, "is trained in full, and would pass that by"),
        ("SFTTrainer", {"attach": {"new_tokens": [96]}}, "would pass by the rows of the new tokens"),
        (
            "RewardTrainer",
            {"attach": {"modules_to_save": []}},
            r"lacks score, .* accepted: SubspaceConfig\(modules_to_save",
        ),
        ("SFTTrainer", {"save_on_each_node": True}, "save_on_each_node is on"),
        (
            "SFTTrainer",
            {"keywords": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": []})}},
            "chooses its parameters itself",
        ),
    ],
)
def test_one_sentence_names_what_is_given_and_what_is_accepted(
    trainer: str, changes: dict[str, Any], sentence: str, base: Path, tmp_path: Path
) -> None:
    untied = {"tie_word_embeddings": False} if {"attach", "load"} & set(changes) and trainer != "RewardTrainer" else {}
    folder = bench.save_base(tmp_path / "base", **untied) if untied else base
    with pytest.raises(UsageError, match=sentence) as refused:
        bench.made(trainer, folder, tmp_path / "out", **changes).create_optimizer()
    assert "accepted: " in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_without_a_method_is_refused(base: Path, tmp_path: Path) -> None:
    for model, said in ((tiny_model(), "a LlamaForCausalLM"), (str(base), "a str"), (None, "None")):
        with pytest.raises(UsageError, match=f"model is {said} without a subspace method"):
            bench.on("SFTTrainer", model, base, bench.arguments("SFTTrainer", tmp_path))


def test_an_adapter_that_was_loaded_is_no_policy_whose_reference_is_the_base(base: Path, tmp_path: Path) -> None:
    model = dsub.attach(dsub.load_frozen(base, storage="fp32"), dsub.SubspaceConfig(rank=2))
    dsub.save_adapter(model, tmp_path / "adapter")
    loaded = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"the adapter of `model` was loaded, .* precompute_ref_log_probs=True"):
        bench.on("DPOTrainer", loaded, base, bench.arguments("DPOTrainer", tmp_path))


def test_the_mixin_stands_before_a_trainer_that_it_knows() -> None:
    with pytest.raises(UsageError, match=r"accepted: class Behind\(dist_subspace.TrainerMixin, ...\)"):
        type("Behind", (transformers.Trainer, dsub.TrainerMixin), {})
    for theirs in (trl.GRPOTrainer, orpo.ORPOTrainer):
        with pytest.raises(UsageError, match=f"TRL's {theirs.__name__}, which TrainerMixin does not know"):
            type("Mine", (dsub.TrainerMixin, theirs), {})
    mine = type("Mine", (dsub.TrainerMixin, trl.DPOTrainer), {})
    assert trainer_of_trl(mine) == "DPOTrainer" and trainer_of_trl(transformers.Trainer) is None


def test_a_head_that_is_called_by_its_reader_may_be_anything() -> None:
    model = dsub.attach(tiny_model("BertForSequenceClassification"), dsub.SubspaceConfig(rank=2))
    check_head(model, "anybody")  # no language model's head
    check_head(dsub.attach(tiny_model(), dsub.SubspaceConfig(rank=2)), "anybody")
