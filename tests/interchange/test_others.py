"""What PEFT and transformers make of an adapter folder of ours: the right thing, without a word, or an error that names us."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS
from tests.interchange.peft.adapters import DIRECT, NOT_ON_CONV1D, model_with
from tests.interchange.trained import trained
from tests.tiny_models import FAMILIES, logits, tiny_model

TOKENS = ("prompt", "p-tuning", "prefix")
# transformers' own reader injects layers alone, and says so of what is none; of AdaLoRA it reports a counter that no file holds.
INJECTED = [name for name in DIRECT if name not in (*TOKENS, "vera")]
OURS = sorted(dsub.methods().keys() - DIRECT.keys())


@contextmanager
def said() -> Iterator[list[str]]:
    """Every warning, and every line that PEFT or transformers log."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
            lines += [str(w.message) for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)]
            # Of any OFT without a version, which is what tells PEFT's own folders from ours.
            lines[:] = [line for line in lines if not line.startswith("The cayley-neumann parameterization has been")]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual[:, -expected.shape[1] :] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", DIRECT)
def test_peft_reads_a_folder_of_its_own_methods_without_a_word(method: str, tmp_path: Path) -> None:
    model = model_with(method)
    dsub.save_adapter(model, tmp_path, "org/base")
    with said() as lines:
        theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        assert peft.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "org/base"
    assert lines == []
    assert_near(logits(theirs), logits(model))


@pytest.mark.parametrize("method", INJECTED)
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"]
)
def test_transformers_reads_a_folder_of_pefts_methods(method: str, name: str, tmp_path: Path) -> None:
    if name.startswith("GPT2") and method in NOT_ON_CONV1D:
        pytest.skip(f"PEFT has no {method} on Conv1D")
    model = model_with(method, name)
    dsub.save_adapter(model, tmp_path)
    theirs = tiny_model(name)
    with said() as lines:
        theirs.load_adapter(str(tmp_path))
    assert lines == [] or (method == "adalora" and "ranknum" in lines[0] and "lora_" not in lines[0])
    assert_near(logits(theirs.eval()), logits(model))


@pytest.mark.parametrize(
    ("name", "module"), [("Qwen2ForCausalLM", "lm_head"), ("BertForSequenceClassification", "classifier")]
)
def test_transformers_reads_modules_that_were_trained_in_full(name: str, module: str, tmp_path: Path) -> None:
    model = trained(tiny_model(name), "dora", modules_to_save=[module])
    dsub.save_adapter(model, tmp_path)
    theirs = tiny_model(name)
    theirs.load_adapter(str(tmp_path))
    assert_near(logits(theirs.eval()), logits(model))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "BertForSequenceClassification"])
def test_the_auto_classes_load_base_and_adapter_by_a_relative_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(name).save_pretrained("models/base")
    model = trained(dsub.load_frozen("models/base", storage="fp32", task=FAMILIES[name][1]), "dora")
    dsub.save_adapter(model, "runs/adapter")
    kind: Any = {"LlamaForCausalLM": "AutoModelForCausalLM", "BertForMaskedLM": "AutoModelForMaskedLM"}.get(
        name, "AutoModelForSequenceClassification"
    )
    assert_near(logits(getattr(transformers, kind).from_pretrained("runs/adapter").eval()), logits(model))
    auto = peft.AutoPeftModelForCausalLM if name == "LlamaForCausalLM" else peft.AutoPeftModel
    assert_near(logits(auto.from_pretrained("runs/adapter").eval()), logits(model))


def ways(folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "config": lambda: peft.PeftConfig.from_pretrained(str(folder)),
        "model": lambda: peft.PeftModel.from_pretrained(tiny_model(), folder),
        "auto": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
        "transformers": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
        "injected": lambda: tiny_model().load_adapter(str(folder)),
    }


@pytest.mark.parametrize("method", [*OURS, "lora with mpc_n", "lora with new tokens"])
def test_a_method_that_peft_has_not_is_said_to_be_ours_in_its_own_error(method: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    name, _, more = method.partition(" with ")
    config: dict[str, Any] = {"mpc_n": {"constraint": "mpc_n"}, "new tokens": {"new_tokens": [96]}}.get(more, {})
    model = trained(dsub.load_frozen(tmp_path / "base", storage="fp32"), name, **config)
    folder = dsub.save_adapter(model, tmp_path / "adapter")
    for way, load in ways(folder).items():
        with pytest.raises(Exception, match="dist_subspace") as error:
            load()
        assert isinstance(error.value, KeyError | OSError), way
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(KeyError, match=rf"{name} adapter of dist_subspace, .*load_adapter"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_that_lies_elsewhere_is_asked_for_in_their_own_error(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    dsub.save_adapter(trained(dsub.load_frozen(tmp_path / "base", storage="fp32")), tmp_path / "adapter")
    for load in (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        with pytest.raises(
            OSError, match=r"\./base \(a folder of the machine where dist_subspace wrote this adapter: load the"
        ):
            load.from_pretrained(tmp_path / "adapter")


def test_what_peft_has_saved_over_our_folder_is_pefts(tmp_path: Path) -> None:
    """Our own entries describe another adapter then."""
    dsub.save_adapter(trained(tiny_model()), tmp_path)
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=3, lora_alpha=30, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="was not written by dist_"):
        dsub.load_adapter(tiny_model(), tmp_path)
    dsub.import_peft(tiny_model(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS, OWN_CONFIG]
