"""What the command line means, and what its data is read by."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.errors import UsageError
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.choices import AskedChoices
from dist_subspace.evaluation.model import open_subject
from dist_subspace.evaluation.reading import read_material, read_subject
from dist_subspace.evaluation.subject import find_subject
from tests.evaluation.runs import CLASSES, evaluated, refused


def material(said: list[str], **given: Any) -> Any:
    asked = Asked(**given)
    return read_material(asked, read_subject(asked), False, said.append)


def test_a_run_a_checkpoint_and_a_copied_adapter(home: Path, tmp_path: Path) -> None:
    of_run = find_subject(str(home / "run"), None, None, [])
    assert (of_run.adapter, str(of_run.run)) == (home / "run" / "adapter", str(home / "run"))
    of_checkpoint = find_subject(str(home / "run" / "checkpoint-2"), None, None, [])
    assert of_checkpoint.adapter == home / "run" / "checkpoint-2" and of_checkpoint.config == of_run.config
    copied = shutil.copytree(home / "run" / "adapter", tmp_path / "adapter")
    apart = find_subject(str(copied), None, "x'y.jsonl", ["model.storage=nf4"])
    assert (apart.run, apart.storage, apart.config.data.eval) == (None, "nf4", "x'y.jsonl")
    assert apart.config.data.format == "alpaca"  # which the adapter itself says


def test_an_adapter_that_peft_wrote_is_measured_on_the_base_that_it_names(home: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    PeftModel.from_pretrained(base, home / "run" / "adapter").save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(home / "model")}))
    settings = ("--data", home / "eval.jsonl", "model.storage=fp32", "data.format=alpaca")
    found = evaluated(tmp_path / "theirs", *settings, "training.per_device_train_batch_size=2")
    assert found["adapter"] == evaluated(home / "run")["adapter"]


def test_an_override_may_stand_where_a_target_would(home: Path) -> None:
    found = find_subject("data.format=text", str(home / "model"), "x.txt", ["model.storage=fp32"])
    assert (found.adapter, found.config.data.format, found.config.model.storage) == (None, "text", "fp32")
    assert find_subject(None, str(home / "model"), "x.txt", ["data.format=text"]).config.model.storage == "bf16"


def test_the_held_out_part_of_the_training_data_is_measured(home: Path, said: list[str]) -> None:
    found = material(said, target=str(home / "run"), overrides=["data.eval=0.25"])
    assert len(found.samples.table) == 5 and found.samples.name == "the 0.25 held out of train.jsonl"
    assert len(material(said, target=str(home / "run"), limit=3).samples.table) == 3


def test_a_length_that_nobody_has_given_is_the_models(home: Path, said: list[str]) -> None:
    asked = {"base": str(home / "model"), "data": str(home / "eval.jsonl"), "overrides": ["data.format=alpaca"]}
    assert material(said, **asked).subject.config.data.max_length == 128
    with pytest.raises(UsageError, match=r"data.max_length is 500; accepted: at most 128, the model's positions"):
        material(said, **asked | {"overrides": ["data.format=alpaca", "data.max_length=500"]})


def test_a_base_is_held_as_it_is_told(home: Path, said: list[str]) -> None:
    asked = Asked(base=str(home / "model"), data="x", overrides=["data.format=text", "model.storage=int8"])
    opened = open_subject(read_subject(asked), lambda done, total: None, said.append)
    assert (opened.preset, opened.pad_id, opened.rows) == ("none", 1, len(opened.tokenizer))
    assert not any(p.requires_grad for p in opened.model.parameters()) and not opened.model.training


def test_labels_that_training_never_saw_are_refused_by_name(classified: Path) -> None:
    (classified / "other.jsonl").write_text(json.dumps({"text": "x", "label": "zebra"}) + "\n")
    said = refused(classified / "run", "--data", classified / "other.jsonl")
    assert re.search(r"has the label 'zebra', which the training data has not \(there: a, b, c\)", said)
    few = (classified / "train.jsonl").read_text().splitlines(keepends=True)
    (classified / "few.jsonl").write_text("".join(few[1:3] * 3))
    said = refused(classified / "run", f"data.train={classified / 'few.jsonl'}", "data.eval=0.5")
    assert "data.train has the labels b, c today, and the adapter was trained on a, b, c" in said


def test_classes_of_an_adapter_alone_are_those_of_its_training(classified: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(classified / "run" / "adapter", tmp_path / "adapter")
    found = evaluated(copied, "--data", classified / "eval.jsonl", "training.per_device_train_batch_size=2")
    of_run = evaluated(classified / "run")
    assert found["adapter"] == of_run["adapter"] and len(CLASSES) == 3
    assert "the base has no head of its own" in refused(classified / "run", "--compare-base")
    assert "names no classes" in refused("--base", classified / "model", "model.task=classification", "--data", "x")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(batch_size=0), "--batch-size is 0"),
        (Asked(max_new_tokens=0), "--max-new-tokens is 0"),
        (Asked(choices=AskedChoices(("a", "b"), "c")), "both --choice and --choices-field"),
        (Asked(choices=AskedChoices(answer_field="c")), "--answer-field is given without choices"),
        (Asked(base="m", compare_base=True), "--compare-base is given with --base"),
        (Asked(tasks=("t",), data="x"), "--tasks and --data are given"),
        (Asked(num_fewshot=3), "which is not given"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(asked: Asked, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        asked.check()
