"""What an export tells its readers: whether one γ is enough, how a Conv1D lies, and what no LoRA holds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG
from tests.interchange import vllm_rules
from tests.interchange.trained import trained
from tests.tiny_models import logits, tiny_model


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("method", "alpha", "form"),
    [("rslora", 4.0, "direct"), ("rslora", 2.0, "lora"), ("lora", 2.0, "direct"), ("lora", 4.0, "lora")],
)
def test_ranks_and_alphas_of_single_layers_stay_in_the_file_where_all_have_one_scale(
    method: str, alpha: float, form: str, tmp_path: Path
) -> None:
    """Rank 4 and α 8 beside rank 1: γ is the same by α / √r with α 4, by α / r with α 2. vLLM reads no patterns."""
    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": alpha}}
    model = trained(tiny_model(), method, rank=4, alpha=8.0, **patterns)
    assert dsub.export_peft(model, tmp_path / "out", report=None).form == form
    theirs = vllm_rules.apply(tiny_model(), tmp_path / "out") if form == "lora" else None
    theirs = theirs or peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()
    assert near(logits(theirs), logits(model))


@pytest.mark.parametrize(("name", "conv1d"), [("GPT2LMHeadModel", True), ("LlamaForCausalLM", False)])
def test_peft_is_told_how_a_layer_lies_and_has_nothing_to_correct(name: str, conv1d: bool, tmp_path: Path) -> None:
    model = trained(tiny_model(name), "trilora")
    dsub.export_peft(model, tmp_path / "out", report=None)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fan_in_fan_out"] is conv1d
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path / "out").eval()
    assert near(logits(theirs), logits(model))


def test_no_approximation_leaves_a_changed_bias_out(tmp_path: Path) -> None:
    model = trained(tiny_model("GPT2LMHeadModel"), "ssb", options={"scale_bias": True})
    with pytest.raises(UsageError, match="method ssb changes biases, which a LoRA does not hold; accepted: merge"):
        dsub.export_peft(model, tmp_path / "out", approximate_rank=4)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_form_that_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tiny_model(), "vera")
    folder = dsub.save_adapter(model, tmp_path / "adapter")
    for asked, peft_type in (("direct", "VERA"), ("lora", "LORA")):
        out = tmp_path / asked
        assert main(["export", str(folder), str(out), "--form", asked, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["form"], told["peft_type"]) == (asked, peft_type)
        assert near(logits(peft.PeftModel.from_pretrained(tiny_model(), out).eval()), logits(model))
    assert main(["export", str(folder), str(tmp_path / "scaling"), "--form", "scaling"]) == 2
    assert "form is 'scaling', which method vera does not have here" in capsys.readouterr().err
