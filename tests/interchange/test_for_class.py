"""What was trained on the text model of a vision and language checkpoint acts on the class that its config.json names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.api import load_adapted
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG
from dist_subspace.interchange.for_class import renamed_key
from dist_subspace.interchange.peft.importing import rewrite_peft
from tests.interchange.trained import trained
from tests.tiny_models import tiny_model, vision_model

TARGETS = ["q_proj", "v_proj", "up_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": TARGETS, "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    "dora": {"target_modules": TARGETS},
    "trilora": {"target_modules": TARGETS, "modules_to_save": ["lm_head"]},
    "ssl": {},
}
# The text model that load_frozen, and AutoModelForCausalLM, make of the checkpoint.
TEXT_MODELS = {
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "MllamaForConditionalGeneration": "MllamaForCausalLM",
}


def text_logits(model: Any) -> torch.Tensor:
    """Of text alone, which none of the models looks at an image for."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def in_peft(whole: Any, base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|Unexpected keyword)")
        return peft.PeftModel.from_pretrained(type(whole).from_pretrained(base), folder).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_an_export_from_the_text_model_acts_on_the_checkpoints_own_class(
    name: str, method: str, tmp_path: Path
) -> None:
    base, whole = tmp_path / "base", vision_model(name)
    whole.save_pretrained(base)
    plain = dsub.load_frozen(base, storage="fp32")
    assert type(plain).__name__ == TEXT_MODELS[name]
    model = trained(plain, method, **METHODS[method])
    assert (text_logits(model) - text_logits(whole)).abs().max() > 1e-2
    own = dsub.save_adapter(model, tmp_path / "own")
    for source in (model, own):
        out = tmp_path / f"out-{type(source).__name__}"
        report = dsub.export_peft(source, out, report=None)
        assert report.model_class == name and f"for {name}, the class that" in str(report)
        assert json.loads((out / CONFIG).read_text())["task_type"] == "CAUSAL_LM"
        assert_near(text_logits(in_peft(whole, base, out)), text_logits(model))
        theirs = type(whole).from_pretrained(base)
        theirs.load_adapter(str(out))
        assert_near(text_logits(theirs.eval()), text_logits(model))
        assert f"{name}.from_pretrained(" in (out / "README.md").read_text()
    again = dsub.import_peft(dsub.load_frozen(base, storage="fp32"), tmp_path / "out-PosixPath")
    assert_near(text_logits(again), text_logits(model))
    rewrite_peft(tmp_path / "out-PosixPath", tmp_path / "rewritten", base_fingerprint)
    again = dsub.load_adapter(dsub.load_frozen(base, storage="fp32"), tmp_path / "rewritten")
    assert_near(text_logits(again), text_logits(model))
    trained_class = dsub.export_peft(own, tmp_path / "text", for_class="trained", report=None)
    assert trained_class.model_class is None and f"not for the base's own {name}" in str(trained_class)
    text = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert_near(text_logits(peft.PeftModel.from_pretrained(text, tmp_path / "text").eval()), text_logits(model))
    assert_near(text_logits(load_adapted(own)), text_logits(model))


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_a_model_of_the_checkpoints_own_class_without_an_encoder_is_a_causal_one(name: str, tmp_path: Path) -> None:
    """Its vision tower has layers of the same endings, which the export must leave alone."""
    base, whole = tmp_path / "base", vision_model(name)
    whole.save_pretrained(base)
    plain = type(whole).from_pretrained(base).eval()
    layers = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)]
    model = trained(plain, "lora", target_modules=layers)
    report = dsub.export_peft(model, tmp_path / "out", report=None)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert report.model_class is None and config["task_type"] == "CAUSAL_LM" and config["target_modules"] == layers
    assert_near(text_logits(in_peft(whole, base, tmp_path / "out")), text_logits(model))


def test_an_encoder_and_decoder_is_still_one(tmp_path: Path) -> None:
    dsub.export_peft(trained(tiny_model("T5ForConditionalGeneration")), tmp_path / "out", report=None)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_a_text_model_that_the_auto_class_would_not_make_is_named_alike(tmp_path: Path) -> None:
    """transformers itself makes no text model of a Gemma 3 checkpoint."""
    name, base = "Gemma3ForConditionalGeneration", tmp_path / "base"
    whole = vision_model(name)
    whole.save_pretrained(base)
    plain = transformers.Gemma3ForCausalLM(whole.config.text_config)
    plain.model.load_state_dict(whole.model.language_model.state_dict())
    plain.lm_head.load_state_dict(whole.lm_head.state_dict())
    plain.config._name_or_path = str(base)
    model = trained(plain.eval(), "lora", target_modules=TARGETS)
    assert dsub.export_peft(model, tmp_path / "out", report=None).model_class == name
    assert_near(text_logits(in_peft(whole, base, tmp_path / "out")), text_logits(model))


def test_a_class_that_is_not_accepted_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for_class is 'text'; accepted: checkpoint, trained"):
        dsub.export_peft(trained(tiny_model()), tmp_path / "out", for_class="text")


def test_the_longest_module_that_is_known_is_renamed() -> None:
    names = {"model.a": "model.text.a", "model.a.b": "whole.b"}
    assert renamed_key("base_model.model.model.a.b.lora_A.weight", names) == "base_model.model.whole.b.lora_A.weight"
    assert renamed_key("base_model.model.model.ab.lora_A.weight", names) == "base_model.model.model.ab.lora_A.weight"
    assert renamed_key("base_model.vera_A", names) == "base_model.vera_A"
