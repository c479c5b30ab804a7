"""BitFit: which biases are trained, what they add, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, named_trainables, trainable_parameters
from tests.subspace.golden import BIAS, G, W, X, give, layer
from tests.tiny_models import logits, tiny_model

DELTA = torch.tensor([0.5, -1.0, 0.25])


def attach(model: Any, **config: Any) -> Any:
    return dsub.attach(model, SubspaceConfig("bitfit", **config))


def endings(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in attached(model).layers}


def test_a_deviation_is_added_to_the_output_and_its_gradient_is_the_outputs() -> None:
    for bias, frozen in ((False, 0), (True, BIAS)):
        module = give(layer("bitfit", bias=bias), bitfit_b=DELTA)
        torch.testing.assert_close(module(X), X @ W.t() + frozen + DELTA)
        module(X.expand(3, 4)).backward(G.expand(3, 3))
        torch.testing.assert_close(module.bitfit_b.grad, 3 * G[0])


def test_merging_leaves_the_matrix_and_moves_the_bias() -> None:
    module = give(layer("bitfit", bias=True), bitfit_b=DELTA)
    assert torch.equal(module.merged(W), W)
    torch.testing.assert_close(module.merged_bias(BIAS), BIAS + DELTA)
    torch.testing.assert_close(give(layer("bitfit"), bitfit_b=DELTA).merged_bias(None), DELTA)


def test_three_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("bitfit").trainables().values()) == 3


def test_every_bias_of_a_model_is_trained_and_the_heads_are_not() -> None:
    model = tiny_model("BertForMaskedLM")
    outside = {"cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.transform.dense.bias"}
    outside |= {"cls.predictions.transform.LayerNorm.bias"}
    expected = {
        n.removesuffix(".bias") for n, _ in model.named_parameters() if n.endswith(".bias") and n not in outside
    }
    assert set(attached(attach(model)).layers) == expected
    assert sum(p.numel() for p in trainable_parameters(model)) == 32 + 2 * (4 * 32 + 44 + 32 + 2 * 32)


def test_gpt2s_final_norm_is_one_of_them() -> None:
    assert "transformer.ln_f" in attached(attach(tiny_model("GPT2LMHeadModel"))).layers


def test_a_model_without_biases_gets_zero_ones_on_its_linear_layers() -> None:
    model = attach(tiny_model("LlamaForCausalLM"))
    assert len(attached(model).layers) == 14 and "norm" not in " ".join(attached(model).layers)


def test_a_model_with_some_gets_no_others_unless_asked() -> None:
    assert endings(attach(tiny_model("Qwen2ForCausalLM"))) == {"q_proj", "k_proj", "v_proj"}
    assert len(attached(attach(tiny_model("Qwen2ForCausalLM"), options={"biases": "add"})).layers) == 14


def test_existing_biases_where_there_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match=r"subspace\.options\.biases is 'existing', but no target has a bias"):
        attach(tiny_model("LlamaForCausalLM"), options={"biases": "existing"})


def test_the_users_targets_can_name_linear_layers_and_norms() -> None:
    assert endings(attach(tiny_model("BertForMaskedLM"), target_modules=["query", "LayerNorm"])) == {
        "query",
        "LayerNorm",
    }
    assert endings(attach(tiny_model("GPT2LMHeadModel"), target_modules=["ln_1"])) == {"ln_1"}
    assert not endings(attach(tiny_model("BertForMaskedLM"), target_modules="all-linear")) & {"LayerNorm"}
    excluded = attach(tiny_model("GPT2LMHeadModel"), exclude_modules=["ln_f"])
    assert endings(excluded) == {"ln_1", "ln_2", "c_attn", "c_proj", "c_fc"}
    with pytest.raises(UsageError, match="matches no linear layer"):
        attach(tiny_model("GPT2LMHeadModel"), target_modules=["LayerNorm"])
    for others in ("ln_1", "c_attn"):
        with pytest.raises(UsageError, match="target_modules has 'LayerNorm', which matches no linear layer"):
            attach(tiny_model("GPT2LMHeadModel"), target_modules=[others, "LayerNorm"])


def test_the_trained_model_is_the_base_with_other_biases(tmp_path: Path) -> None:
    """The reference has its own biases changed by hand."""
    model, plain = attach(tiny_model("GPT2LMHeadModel")), tiny_model("GPT2LMHeadModel")
    for name, parameter in named_trainables(model).items():
        parameter.data.normal_(std=0.2)
        plain.get_submodule(name.rpartition(".")[0]).bias.data += parameter.data
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    dsub.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(dsub.load_adapter(tiny_model("GPT2LMHeadModel"), tmp_path)), logits(model))
