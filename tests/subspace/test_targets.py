"""Which layers are trained, on every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dist_subspace import SubspaceConfig, attach
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, trainable_parameters
from tests.tiny_models import FAMILIES, tiny_model

BLOCK = {
    "LlamaForCausalLM": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Qwen2ForCausalLM": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "MistralForCausalLM": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "GPT2LMHeadModel": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "OPTForCausalLM": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "GPTNeoXForCausalLM": {"query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"},
    "BertForMaskedLM": {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"},
    "BertForSequenceClassification": {"query", "key", "value", "attention.output.dense", "intermediate.dense"}
    | {"output.dense"},
    "RobertaForSequenceClassification": {"query", "key", "value", "attention.output.dense", "intermediate.dense"}
    | {"output.dense"},
    "T5ForConditionalGeneration": {"SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"}
    | {"EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o", "wi", "wo"},
}
OWN = {
    "LlamaForCausalLM": {"k_proj", "v_proj", "up_proj"},
    "Qwen2ForCausalLM": {"k_proj", "v_proj", "up_proj"},
    "MistralForCausalLM": {"k_proj", "v_proj", "up_proj"},
    "GPT2LMHeadModel": {"attn.c_attn", "mlp.c_fc"},
    "OPTForCausalLM": {"k_proj", "v_proj", "fc1"},
    "GPTNeoXForCausalLM": {"query_key_value", "dense_h_to_4h"},
    "BertForMaskedLM": {"key", "value", "intermediate.dense"},
    "BertForSequenceClassification": {"key", "value", "intermediate.dense"},
    "RobertaForSequenceClassification": {"key", "value", "intermediate.dense"},
    "T5ForConditionalGeneration": {
        "SelfAttention.k",
        "SelfAttention.v",
        "EncDecAttention.k",
        "EncDecAttention.v",
        "wi",
    },
}


def layers(model: Any, **config: Any) -> tuple[str, ...]:
    return attached(attach(model, SubspaceConfig(**{"rank": 2, **config}))).layers


def endings(names: tuple[str, ...], wanted: set[str]) -> set[str]:
    """The members of `wanted` that end some name; every name must have one."""
    found = set()
    for name in names:
        own = {w for w in wanted if name.endswith("." + w)}
        assert own, f"{name} is no expected target"
        found |= own
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_every_linear_of_the_blocks_and_no_head(name: str) -> None:
    model = tiny_model(name)
    expected = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".1." in n]
    chosen = layers(model, target_modules="all-linear")
    assert endings(chosen, BLOCK[name]) == BLOCK[name]
    assert [n for n in chosen if ".1." in n] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scalings_own_targets_are_key_value_and_ffn_up(name: str) -> None:
    for method in ("ssl", "ssb"):
        chosen = layers(tiny_model(name), method=method)
        assert endings(chosen, OWN[name]) == OWN[name]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Albert", {"key", "value", "ffn"}),
        ("MPNet", {"attn.k", "attn.v", "intermediate.dense"}),
        ("Deberta", {"self.in_proj", "intermediate.dense"}),
    ],
)
def test_encoders_with_other_names_have_their_key_value_and_ffn_up_scaled(name: str, wanted: set[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=40, **sizes)
    assert endings(layers(getattr(transformers, f"{name}ForMaskedLM")(config), method="ssl"), wanted) == wanted


def test_endings_name_whole_components() -> None:
    assert layers(tiny_model("GPT2LMHeadModel"), target_modules=["attn.c_proj"]) == (
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_proj",
    )
    assert len(layers(tiny_model("GPT2LMHeadModel"), target_modules=["c_proj"])) == 4
    with pytest.raises(UsageError, match="matches no linear layer"):
        layers(tiny_model("GPT2LMHeadModel"), target_modules=["proj"])


def test_a_pattern_matches_whole_names() -> None:
    chosen = layers(tiny_model(), target_modules=r".*layers\.1\.self_attn\.[qk]_proj")
    assert chosen == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")


def test_excluded_layers_are_left_out() -> None:
    chosen = layers(tiny_model(), exclude_modules=["down_proj", "layers.0.mlp.up_proj"])
    assert len(chosen) == 14 - 3 and not any(name.endswith("down_proj") for name in chosen)


def test_the_head_can_be_named() -> None:
    assert layers(tiny_model(), target_modules=["lm_head", "q_proj"])[-1] == "lm_head"


def test_nothing_matched_shows_names_that_exist() -> None:
    with pytest.raises(
        UsageError, match=r"target_modules is \['query'\], which matches no .*layers\.0\.self_attn\.q_proj"
    ):
        layers(tiny_model(), target_modules=["query"])
    with pytest.raises(UsageError, match=r"is 'all-linear' without \['layers'.*\], which matches no linear layer"):
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        layers(tiny_model(), target_modules="all-linear", exclude_modules=["layers", *names])


def test_a_pattern_that_is_none_is_said() -> None:
    with pytest.raises(
        UsageError, match=r"target_modules is '\*q', which is no regular expression .*accepted: all-linear"
    ):
        layers(tiny_model(), target_modules="*q")


# The published counts: methods.md 10.1 (RoBERTa-base and -large; head apart), 11.6.

SHAPES = {
    "base": {},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
COUNTS = {
    ("ssl", "base"): 27_648,
    ("ssl", "large"): 73_728,
    ("ssb", "base"): 82_944,
    ("ssb", "large"): 221_184,
    ("lora", "base"): 331_776,
    ("lora", "large"): 884_736,
}


@pytest.mark.parametrize(("method", "size"), COUNTS, ids=str)
def test_trained_parameters_are_as_many_as_published(method: str, size: str) -> None:
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SHAPES[size]))
    attach(model, SubspaceConfig(method=method, rank=2))
    assert sum(p.numel() for p in trainable_parameters(model)) == COUNTS[method, size]


@pytest.mark.parametrize("family", ["SqueezeBert", "IBert"])
def test_blocks_in_which_nothing_is_a_linear_layer_are_spoken_of(family: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "vocab_size": 40,
    }
    config = getattr(transformers, f"{family}Config")(**sizes, embedding_size=16)
    model = attach(getattr(transformers, f"{family}ForMaskedLM")(config), SubspaceConfig(method="lora", rank=2))
    assert not any(".layer" in name for name in attached(model).layers)
    assert "left out of all-linear" in caplog.text and "is no linear layer" in caplog.text
