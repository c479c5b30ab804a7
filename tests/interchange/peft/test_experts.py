"""LoRA on experts is written as PEFT's own file of it: PEFT reads the folder, and computes what the model computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.tiny_models import tiny_inputs, tiny_model

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(family: str) -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    more = {"head_dim": 8, "sliding_window": 8} if family == "GptOss" else {}
    return tiny_model(f"{family}ForCausalLM", config_name=f"{family}Config", **sizes | more)


def adapted(family: str, **config: Any) -> Any:
    model = dsub.attach(mixture(family), dsub.SubspaceConfig(**{"method": "lora", "rank": 3, "alpha": 5} | config))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
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
    ("config", "form", "sentence"),
    [
        (
            {"method": "ssl", "rank": None},
            "auto",
            "method ssl on experts has no exact form in PEFT; accepted for it: merge",
        ),
        ({"rank_pattern": {"down_proj": 1}}, "auto", "PEFT has no ranks and alphas of single stacks"),
        ({}, "lora", "form is 'lora', which an adapter on experts does not have; accepted: auto, direct"),
    ],
)
def test_what_peft_does_not_have_is_refused(config: dict[str, Any], form: str, sentence: str, tmp_path: Path) -> None:
    model = adapted("Mixtral", target_parameters=BOTH, **config)
    with pytest.raises(UsageError, match=sentence):
        dsub.export_peft(model, tmp_path / "out", form=form, report=None)
    assert not (tmp_path / "out").exists()
