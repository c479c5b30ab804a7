"""AdaLoRA's layer: golden numbers, initial values, and files that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from dist_subspace import SubspaceConfig, attach, load_adapter, save_adapter, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.subspace import resolve
from dist_subspace.subspace.core.constraints import penalty_value
from tests.subspace.golden import A, B, W, X, give, layer
from tests.tiny_models import logits, tiny_model

E = torch.tensor([0.5, -1])
X3 = torch.tensor([[1.0, -3, 0, 1]])


def golden(**config):  # type: ignore[no-untyped-def]
    module = layer("adalora", rank=2, **{"alpha": 4.0, "options": {"init_rank": 2}, **config})
    return give(module, lora_A=A, lora_B=B, lora_E=E)


def test_the_output_is_the_golden_one() -> None:
    torch.testing.assert_close(golden()(X), torch.tensor([[3.5, 0, -1]]))
    torch.testing.assert_close(golden(alpha=2.0)(X), torch.tensor([[2.0, 2, 1.5]]))


def test_a_nonlinearity_between_the_factors_gives_the_golden_output() -> None:
    torch.testing.assert_close(golden(constraint="mpc_n")(X3), torch.tensor([[9.0, -11, 2]]))


def test_sixteen_values_are_trained_at_two_triplets_and_three_of_the_target_are_allocated_by_default() -> None:
    assert sum(p.numel() for p in golden().trainables().values()) == 16
    assert len(layer("adalora", rank=2).lora_E) == 3


def test_the_defaults_are_a_target_of_8_from_12_and_a_scale_of_2() -> None:
    settings = resolve(SubspaceConfig(method="adalora")).settings
    assert (settings.rank, settings.options["init_rank"], settings.alpha) == (8, 12, 24)
    assert resolve(SubspaceConfig(method="adalora", rank=5)).settings.options["init_rank"] == 8
    assert layer("adalora", rank=2).scale == 2.0
    assert layer("adalora", rank=2, alpha=9).scale == 3.0  # over the three at the start, not the two that are left


def test_its_own_constraint_is_the_mean_of_unsquared_norms_and_can_be_switched_off() -> None:
    constraint = resolve(SubspaceConfig(method="adalora")).settings.constraint
    assert constraint is not None
    assert (constraint.kind, constraint.power, constraint.reduction, constraint.weight) == ("mpc_o", 1, "mean", 0.1)
    assert float(penalty_value(A, B, constraint)) / 2 == pytest.approx(4.8252007828)
    assert resolve(SubspaceConfig(method="adalora", constraint="none")).settings.constraint is None


def test_e_is_zero_and_the_vectors_are_gaussian_of_0_02() -> None:
    model = attach(tiny_model(), SubspaceConfig(method="adalora"))
    parts = [m for m in model.modules() if hasattr(m, "lora_E")]
    assert not any(part.lora_E.any() for part in parts)
    for vectors in ([part.lora_A for part in parts], [part.lora_B for part in parts]):
        flat = torch.cat([v.detach().flatten() for v in vectors])
        assert float(flat.std()) == pytest.approx(0.02, rel=0.05) and abs(float(flat.mean())) < 0.002


def test_fewer_triplets_than_the_rank_are_refused() -> None:
    message = r"subspace\.options\.init_rank is 7; accepted: at least 8, which is subspace\.rank"
    with pytest.raises(UsageError, match=message):
        resolve(SubspaceConfig(method="adalora", options={"init_rank": 7}))


def test_a_layer_has_no_more_triplets_than_its_smaller_side_and_the_scale_that_was_asked_for() -> None:
    module = layer("adalora", rank=3)  # of a 3 x 4 matrix
    assert len(module.lora_E) == 3 and module.scale == 2.0
    assert not module.peft.agrees(module)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_peft_reads_the_files_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = attach(tiny_model(name), SubspaceConfig(method="adalora", rank=4))
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable_parameters(model):
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ADALORA"
    theirs = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    again = load_adapter(tiny_model(name), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)


def test_the_layer_is_pefts_own_for_the_same_values() -> None:
    """PEFT's γ is α / (r + 1e-5): the file's E makes up for it."""
    config = AdaLoraConfig(init_r=2, target_r=1, lora_alpha=4, total_step=1, target_modules=["0"])
    peft = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)), config).base_model.model[0]
    peft.base_layer.weight.data.copy_(W)
    tensors = golden().file_tensors()
    for own in ("lora_A", "lora_B", "lora_E"):
        getattr(peft, own)["default"].data.copy_(tensors[own])
    torch.testing.assert_close(peft(X), torch.tensor([[3.5, 0, -1]]), rtol=1e-6, atol=1e-6)
    assert not torch.equal(tensors["lora_E"][:, 0], E)
