"""Pfeiffer adapters: golden numbers, one a block, and around the output norm of post-norm encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, resolve, trainable_parameters
from tests.subspace.golden import BOTTLENECK, BOTTLENECK_GOLDEN, X, give, layer
from tests.tiny_models import BLOCK_OUTPUTS, FAMILIES, logits, tiny_config, tiny_inputs, tiny_model

POST_NORM = ("BertForMaskedLM", "BertForSequenceClassification", "RobertaForSequenceClassification")


def attach(model: Any, **config: Any) -> Any:
    return dsub.attach(model, SubspaceConfig("pfeiffer", **config))


def test_forward_is_the_golden_one() -> None:
    torch.testing.assert_close(
        give(layer("pfeiffer", rank=2), **BOTTLENECK)(X), torch.tensor([BOTTLENECK_GOLDEN["relu"]])
    )


def test_around_a_norm_it_is_the_formula() -> None:
    """`LN(u + Ad(LN(u)))`."""
    norm = nn.LayerNorm(3)
    nn.init.normal_(norm.weight)
    resolved = resolve(SubspaceConfig("pfeiffer", rank=2))
    part: Any = resolved.method.build(norm, resolved.settings, torch.Generator().manual_seed(0), None)
    u = torch.randn(5, 3)
    assert torch.equal(part(u), norm(u))
    give(part, **BOTTLENECK)
    hidden = (norm(u) @ BOTTLENECK["adapter_down"].t() + BOTTLENECK["adapter_down_bias"]).relu()
    expected = norm(u + hidden @ BOTTLENECK["adapter_up"].t() + BOTTLENECK["adapter_up_bias"])
    torch.testing.assert_close(part(u), expected)
    part.enabled = False
    assert torch.equal(part(u), norm(u))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_adapter_a_block(name: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    chosen = attached(attach(model, rank=2)).layers
    assert torch.equal(logits(model), before)
    assert len(chosen) == (4 if name == "T5ForConditionalGeneration" else 2)
    if name in POST_NORM:
        assert all(layer.endswith(".output.LayerNorm") and "attention" not in layer for layer in chosen)
    else:
        assert all(
            any(layer.endswith(end) for end in BLOCK_OUTPUTS[name]) and "ttention" not in layer for layer in chosen
        )


@pytest.mark.parametrize(
    ("model_class", "config", "norm"),
    [
        ("DistilBertForMaskedLM", tiny_config("DistilBertConfig", num_hidden_layers=1), "output_layer_norm"),
        (
            "DebertaV2ForSequenceClassification",
            tiny_config("DebertaV2Config", num_hidden_layers=1),
            "output.LayerNorm",
        ),
        (
            "AlbertForMaskedLM",
            tiny_config("AlbertConfig", num_hidden_layers=1),
            "full_layer_layer_norm",
        ),
    ],
)
def test_the_output_norms_of_other_post_norm_encoders_are_known(model_class: str, config: Any, norm: str) -> None:
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        before = model(**tiny_inputs(model)).logits
        (site,) = attached(attach(model, rank=2)).layers
        assert site.endswith(norm) and "attention" not in site
        assert torch.equal(model(**tiny_inputs(model)).logits, before)


def test_in_bert_it_is_the_models_own_function_with_an_adapter_in_it() -> None:
    """The reference computes the output block of each layer by the paper's formula, from the plain model's modules."""
    model, plain = attach(tiny_model("BertForMaskedLM"), rank=4), tiny_model("BertForMaskedLM")
    for parameter in trainable_parameters(model):
        parameter.data.normal_(std=0.3)

    def formula(index: int, output: Any) -> Any:
        part = model.bert.encoder.layer[index].output.LayerNorm

        def forward(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            z = output.dense(hidden)
            inner = output.LayerNorm(z + residual) @ part.adapter_down.t() + part.adapter_down_bias
            return output.LayerNorm(z + inner.relu() @ part.adapter_up.t() + part.adapter_up_bias + residual)

        return forward

    for index, block in enumerate(plain.bert.encoder.layer):
        block.output.forward = formula(index, block.output)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_the_bottleneck_is_bounded_by_the_norms_width() -> None:
    assert attached(attach(tiny_model("BertForMaskedLM"))).settings.rank == 32
    with pytest.raises(UsageError, match=r"rank is 33, but .*output\.LayerNorm is 32 wide; accepted: at most 32"):
        attach(tiny_model("BertForMaskedLM"), rank=33)
