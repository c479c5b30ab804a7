"""LoRA on experts is written as PEFT's own file of it: PEFT reads the folder, and computes what the model computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.peft.importing import rewrite_peft
from dist_subspace.subspace import attachment
from tests.tiny_models import tiny_inputs, tiny_model

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


MORE: dict[str, dict[str, Any]] = {
    "GptOss": {"head_dim": 8, "sliding_window": 8},
    "Llama4": {"head_dim": 8, "intermediate_size_mlp": 24, "attention_chunk_size": 8, "pad_token_id": 0},
}


def mixture(family: str) -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2} | MORE.get(family, {})
    config = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    return tiny_model(f"{family}ForCausalLM", config_name=config, **sizes)


def adapted(family: str, **config: Any) -> Any:
    model = dsub.attach(mixture(family), dsub.SubspaceConfig(**{"method": "lora", "rank": 3, "alpha": 5} | config))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": BOTH},
        {"target_parameters": BOTH[1:], "method": "rslora", "dropout": 0.3},
        {"target_parameters": BOTH, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["both", "one", "beside linear layers"],
)
def test_peft_reads_the_folder_and_computes_the_same(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(family, **config).eval()
    given = tiny_inputs(model)
    with torch.no_grad():
        ours = model(**given).logits
    dsub.export_peft(model, tmp_path / "of the model", report=None)
    dsub.save_adapter(model, tmp_path / "adapter")
    report = dsub.export_peft(tmp_path / "adapter", tmp_path / "of the folder", report=None)
    trained = sum(p.numel() for p in dsub.trainable_parameters(model))
    assert (report.peft_type, report.form, report.rank, report.parameters) == ("LORA", "direct", 3, trained)
    for name in ("of the model", "of the folder"):
        theirs = PeftModel.from_pretrained(mixture(family), tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(**given).logits, ours, rtol=1e-4, atol=1e-4)
            with theirs.disable_adapter():
                assert not torch.allclose(theirs(**given).logits, ours, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "rank", "config"),
    [
        ("GptOss", 4, {"method": "pissa", "rank": 2, "target_modules": ["q_proj"]}),
        ("Llama4", 4, {"method": "pissa", "rank": 2, "options": {"residual": "fold"}}),
        ("Mixtral", 2, {"method": "rslora", "rank": 2, "expert_parameters": "shared"}),
    ],
)
def test_what_is_a_low_rank_update_is_written_as_pefts_lora(
    family: str, rank: int, config: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(family, target_parameters=BOTH, **config).eval()
    given = tiny_inputs(model)
    with torch.no_grad():
        ours = model(**given).logits
    report = dsub.export_peft(model, tmp_path / "of the model", report=None)
    assert (report.peft_type, report.form, report.rank) == ("LORA", "lora", rank)
    dsub.save_adapter(model, tmp_path / "adapter")
    dsub.export_peft(tmp_path / "adapter", tmp_path / "of the folder", report=None)
    for name in ("of the model", "of the folder"):
        theirs = PeftModel.from_pretrained(mixture(family), tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(**given).logits, ours, rtol=1e-4, atol=1e-4)
            with theirs.disable_adapter():
                assert not torch.allclose(theirs(**given).logits, ours, atol=1e-2)


def trained_by_peft(family: str, folder: Path, **config: Any) -> torch.Tensor:
    """PEFT's own folder of an adapter on experts, and the logits of its model."""
    given = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": False}
    torch.manual_seed(6)
    theirs = get_peft_model(mixture(family), LoraConfig(**given | config)).eval()
    theirs.save_pretrained(folder)
    with torch.no_grad():
        return theirs(**tiny_inputs(mixture(family))).logits


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mixtral", {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
        ("GptOss", {"target_parameters": BOTH[:1]}),
        ("Llama4", {}),
    ],
)
def test_a_folder_of_pefts_is_read_and_computes_the_same(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    right = trained_by_peft(family, tmp_path / "theirs", **config)
    model = dsub.import_peft(mixture(family), tmp_path / "theirs").eval()
    given = tiny_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, right, rtol=1e-4, atol=1e-4)
    dsub.export_peft(model, tmp_path / "back", report=None)
    theirs, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert theirs.keys() == again.keys() and all(torch.equal(t, again[key]) for key, t in theirs.items())


def test_a_folder_of_pefts_for_other_experts_is_refused(tmp_path: Path) -> None:
    trained_by_peft("Mixtral", tmp_path / "theirs")
    with pytest.raises(UsageError, match="is told by the base model; accepted: with the base model"):
        rewrite_peft(tmp_path / "theirs", tmp_path / "ours")
    for other, sentence in (
        (tiny_model("LlamaForCausalLM"), r"experts model\.layers\.0\.mlp\.experts\.\w+, which this model"),
        (
            tiny_model("MixtralForCausalLM", config_name="MixtralConfig", num_local_experts=2, num_key_value_heads=2),
            "is for 4 experts .* this model's are 2 of",
        ),
    ):
        with pytest.raises(UsageError, match=sentence):
            dsub.import_peft(other, tmp_path / "theirs")
        assert attachment(other) is None


@pytest.mark.parametrize(
    ("config", "form", "sentence"),
    [
        (
            {"method": "ssl", "rank": None},
            "auto",
            "method ssl on experts has no exact form in PEFT; accepted for it: merge",
        ),
        ({"method": "dora"}, "auto", "method dora on experts has no exact form in PEFT; accepted for it: merge"),
        ({"rank_pattern": {"down_proj": 1}}, "auto", "PEFT has no ranks and alphas of single stacks"),
        ({}, "lora", "form is 'lora', which this adapter on experts does not have; accepted: auto, direct"),
    ],
)
def test_what_peft_does_not_have_is_refused(config: dict[str, Any], form: str, sentence: str, tmp_path: Path) -> None:
    model = adapted("Mixtral", target_parameters=BOTH, **config)
    with pytest.raises(UsageError, match=sentence):
        dsub.export_peft(model, tmp_path / "out", form=form, report=None)
    assert not (tmp_path / "out").exists()
