"""(IA)³ against its golden numbers, its two sides, and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, named_trainables
from tests.subspace.golden import BIAS, G, L, S, W, X, give, golden_layer, layer
from tests.tiny_models import logits, tiny_model

SCALED = {"options": {"scale_bias": True}}


def golden(**config: Any) -> Any:
    return give(layer("ia3", **config), ia3_l=L - 1)


def test_forward_is_the_golden_one() -> None:
    for transposed in (False, True):
        torch.testing.assert_close(golden(transposed=transposed)(X), torch.tensor([[1.0, -4, 2]]))
    torch.testing.assert_close(golden(bias=True)(X), torch.tensor([[1.1, -4.2, 2.3]]))
    torch.testing.assert_close(golden(bias=True, **SCALED)(X), torch.tensor([[1.2, -3.8, 2.15]]))


def test_gradients_are_those_of_the_formula() -> None:
    module = golden(bias=True, **SCALED)
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.ia3_l.grad, (G * (X @ W.t() + BIAS))[0])
    torch.testing.assert_close(x.grad, (G * L) @ W)


def test_the_merged_matrix_and_bias_are_scaled_alike_where_the_bias_is_scaled() -> None:
    torch.testing.assert_close(golden().merged(W), L[:, None] * W)
    torch.testing.assert_close(golden(bias=True).merged_bias(BIAS), BIAS)
    torch.testing.assert_close(golden(bias=True, **SCALED).merged_bias(BIAS), L * BIAS)
    assert golden().merged_bias(None) is None


def test_three_values_are_trained_and_the_file_holds_absolute_ones_as_peft_does() -> None:
    assert sum(p.numel() for p in layer("ia3").trainables().values()) == 3
    assert torch.equal(golden().file_tensors()["ia3_l"], L[:, None])


def scaled_inside(ending: str, **options: Any) -> Any:
    model = tiny_model("LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    config = SubspaceConfig("ia3", target_modules=["k_proj", "up_proj", "down_proj"], options=options)
    dsub.attach(model, config)
    return model, model.get_submodule(f"model.layers.0.{ending}")


def test_a_layer_that_scales_its_input_is_the_ssl_card() -> None:
    _, inside = scaled_inside("mlp.down_proj", input_scaled_modules=["down_proj"])
    _, outside = scaled_inside("self_attn.k_proj", input_scaled_modules=["down_proj"])
    assert inside.ia3_l.shape == (inside.in_features,) and outside.ia3_l.shape == (outside.out_features,)
    assert inside.file_tensors()["ia3_l"].shape == (1, inside.in_features)
    inside.ia3_l.data.normal_()
    x = torch.randn(3, inside.in_features)
    expected = (x * (1 + inside.ia3_l)) @ inside.base.dense().t() + inside.bias
    torch.testing.assert_close(inside(x), expected)
    merged = inside.merged(inside.base.dense())
    torch.testing.assert_close(x @ merged.t() + inside.merged_bias(inside.bias), expected)
    assert golden_layer("ssl").scaling_form()[0].equal(S)
    assert inside.scaling_form()[1] is None and outside.scaling_form()[0] is None


def test_an_input_scaled_module_that_is_no_target_is_refused_and_the_model_untouched() -> None:
    model = tiny_model()
    config = SubspaceConfig("ia3", options={"input_scaled_modules": ["down_proj"]})
    with pytest.raises(UsageError, match=r"input_scaled_modules has 'down_proj', which names no target; .*k_proj"):
        dsub.attach(model, config)
    assert model.model.norm.weight.requires_grad, "frozen before the configuration was found good"


# PEFT.


def trained(model: nn.Module, **config: Any) -> Any:
    dsub.attach(model, SubspaceConfig("ia3", **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in dsub.trainable_parameters(model):
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


CASES = {
    "LlamaForCausalLM": {"target_modules": ["k_proj", "v_proj", "down_proj"]},
    "GPT2LMHeadModel": {"target_modules": ["attn.c_attn", "mlp.c_proj"]},
    "OPTForCausalLM": {"target_modules": ["k_proj", "v_proj", "fc2"]},
    "BertForSequenceClassification": {"target_modules": ["key", "value", "output.dense"]},
    "T5ForConditionalGeneration": {"target_modules": ["SelfAttention.k", "SelfAttention.v", "wo"]},
}
INSIDE = {"LlamaForCausalLM": "down_proj", "GPT2LMHeadModel": "mlp.c_proj", "OPTForCausalLM": "fc2"} | {
    "BertForSequenceClassification": "output.dense",
    "T5ForConditionalGeneration": "wo",
}


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same_logits_from_our_files(name: str, tmp_path: Path) -> None:
    options = {"scale_bias": True, "input_scaled_modules": [INSIDE[name]]}
    model = trained(tiny_model(name), **CASES[name], options=options)
    dsub.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert type(theirs.peft_config["default"]) is peft.IA3Config
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


def test_peft_is_named_only_where_it_would_compute_the_same(tmp_path: Path) -> None:
    """PEFT scales biases; a model without any is the same in both."""
    for name, scale_bias, agrees in (
        ("LlamaForCausalLM", False, True),
        ("Qwen2ForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, True),
    ):
        dsub.save_adapter(trained(tiny_model(name), options={"scale_bias": scale_bias}), tmp_path)
        described = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (described["peft_type"] == "IA3") == agrees


def test_our_layers_read_back_what_both_sides_wrote(tmp_path: Path) -> None:
    options = {"input_scaled_modules": ["down_proj"]}
    model = trained(tiny_model(), **CASES["LlamaForCausalLM"], options=options)
    dsub.save_adapter(model, tmp_path)
    again = dsub.load_adapter(tiny_model(), tmp_path)
    assert attached(again).layers == attached(model).layers
    for name, parameter in named_trainables(again).items():
        torch.testing.assert_close(parameter, named_trainables(model)[name], rtol=0, atol=1e-6)
