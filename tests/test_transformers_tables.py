"""What is read of transformers' tables is what its models do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from dist_subspace.transformers_tables import (
    OtherAttention,
    attention_function,
    attention_name,
    calls_attention_by_name,
    shifts_labels,
)
from tests.tiny_models import tiny_model


def attention_of(model: torch.nn.Module) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_function_is_the_one_that_the_model_calls(name: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(name)
    attention = attention_of(model)
    assert calls_attention_by_name(attention) and not calls_attention_by_name(model.get_input_embeddings())
    assert attention_name(model.config) == name
    function, calls = attention_function(attention, model.config), []
    transformers.AttentionInterface.register(
        "watched", lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)
    )
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        attention.config = OtherAttention(attention.config, "watched")
        assert torch.equal(model(input_ids=ids).logits, expected) and calls == [1]


def test_a_configuration_with_another_attention_is_the_models_own_in_all_else() -> None:
    config = tiny_model().config
    other = copy.deepcopy(OtherAttention(config, "another"))
    assert attention_name(other) == "another" and other.hidden_size == config.hidden_size
    assert attention_name(config) != "another" and attention_name(object()) is None


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"])
def test_a_loss_that_shifts_its_labels_does_not_see_the_first_of_each_row(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(4, 10)[None]
    labels = ids.clone()
    with torch.no_grad():
        first = model(input_ids=ids, labels=labels).loss
        labels[:, 0] = 11
        assert bool(model(input_ids=ids, labels=labels).loss == first) == shifts_labels(model)
