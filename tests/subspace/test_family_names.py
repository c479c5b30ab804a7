"""Which layers the default targets of the scalings and of the adapters mean, family by family: lists made by hand from
transformers' model classes, so that a name that is lost is missed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import peft.utils.constants
import pytest
import torch

from dist_subspace import SubspaceConfig, attach
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached
from tests.families.cases import Case
from tests.families.reference import linear_names

pytestmark = pytest.mark.usefixtures("said")  # what a default leaves out is said

LLAMA = ("k_proj v_proj up_proj", "o_proj", "down_proj")
BERT = ("key value intermediate.dense", "attention.output.dense", "layer.N.output.dense")
GPT2 = ("c_attn c_fc", "attn.c_proj", "mlp.c_proj")
T5 = "SelfAttention.k SelfAttention.v EncDecAttention.k EncDecAttention.v"
NEOX = ("query_key_value dense_h_to_4h", "attention.dense", "dense_4h_to_h")
BART = ("k_proj v_proj fc1", "out_proj", "fc2")

# Endings of key, value and FFN-up; of attention outputs; of FFN outputs. Numbers of blocks are N; None: the family's own names
# are not known, and it is said so.
CAUSAL: dict[str, tuple[str, str | None, str | None]] = {
    "llama": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": ("k_proj v_proj c_fc", "out_proj", "c_proj"),
    "gptj": ("k_proj v_proj fc_in", "out_proj", "fc_out"),
    "codegen": ("qkv_proj fc_in", "out_proj", "fc_out"),
    "gpt_neox": NEOX,
    "bloom": ("query_key_value dense_h_to_4h", "self_attention.dense", "dense_4h_to_h"),
    "falcon": ("query_key_value dense_h_to_4h", "self_attention.dense", "dense_4h_to_h"),
    "persimmon": ("query_key_value dense_h_to_4h", "self_attn.dense", "dense_4h_to_h"),
    "mpt": ("Wqkv up_proj", "out_proj", "down_proj"),
    "opt": BART,
    "phi": ("k_proj v_proj fc1", "self_attn.dense", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "down_proj"),  # its gate_up_proj holds a gate
    "glm4": ("k_proj v_proj", "o_proj", "down_proj"),
    "starcoder2": ("k_proj v_proj c_fc", "o_proj", "c_proj"),
    "modernbert-decoder": ("k_proj v_proj", "attn.Wo", "mlp.Wo"),
    "lfm2": ("k_proj v_proj w3", "out_proj", "w2"),
    "deepseek_v3": ("kv_b_proj up_proj", "o_proj", "down_proj"),
    "deepseek_v4": ("self_attn.kv_proj up_proj", None, "down_proj"),
    "jetmoe": ("kv_proj", None, None),
    "moshi": ("k_proj.linear v_proj.linear fc1", None, "fc2"),
    "ctrl": ("Wk Wv ffn.0", None, None),
    "cpmant": ("project_k project_v w_1", None, None),
    "xlnet": ("layer_1", None, None),
    "mamba2": ("in_proj", None, None),
    "zaya": ("k_proj v_proj_current v_proj_delayed", "o_proj", None),  # its router has an fc1, an fc2 and an out_proj
}
MASKED: dict[str, tuple[str, str | None, str | None]] = {
    "bert": BERT,
    "mobilebert": ("key value intermediate.dense", "attention.output.dense", "output.dense"),
    "albert": ("key value ffn", "attention.dense", "ffn_output"),
    "distilbert": ("k_lin v_lin lin1", "out_lin", "lin2"),
    "xlm": ("k_lin v_lin lin1", "out_lin", "lin2"),
    "deberta": ("in_proj intermediate.dense", *BERT[1:]),
    "deberta-v2": ("key_proj value_proj intermediate.dense", *BERT[1:]),
    "mpnet": ("attn.k attn.v intermediate.dense", None, "layer.N.output.dense"),
    "longformer": ("key value key_global value_global intermediate.dense", *BERT[1:]),
    "funnel": ("k_head v_head linear_1", None, None),
    "perceiver": ("key value dense1", "attention.output.dense", None),
    "modernbert": ("Wqkv", "attn.Wo", "mlp.Wo"),
    "reformer": ("key value feed_forward.dense.dense", "attention.output.dense", "feed_forward.output.dense"),
}
SEQ2SEQ: dict[str, tuple[str, str | None, str | None]] = {
    "t5": (f"{T5} wi", "SelfAttention.o EncDecAttention.o", "wo"),
    "mt5": (f"{T5} wi_1", "SelfAttention.o EncDecAttention.o", "wo"),
    "longt5": (
        f"{T5} LocalSelfAttention.k LocalSelfAttention.v wi",
        "SelfAttention.o EncDecAttention.o LocalSelfAttention.o",
        "wo",
    ),
    "longt5+transient-global": (
        f"{T5} TransientGlobalSelfAttention.k TransientGlobalSelfAttention.v wi",
        "SelfAttention.o EncDecAttention.o TransientGlobalSelfAttention.o",
        "wo",
    ),
    "bart": BART,
    "prophetnet": ("key_proj value_proj feed_forward.intermediate", "out_proj", None),
}
ALL = {
    f"{task}/{family}": row
    for task, table in (("causal-lm", CAUSAL), ("masked-lm", MASKED), ("seq2seq-lm", SEQ2SEQ))
    for family, row in table.items()
}
CHANGES: dict[str, tuple[tuple[str, Any], ...]] = {
    "transient-global": (("encoder_attention_type", "transient-global"),),
    "reformer": (("attn_layers", ["local", "local"]),),  # the other kind reads its weights, and cannot be changed
}
# Where the adapter goes around the norm behind the FFN's residual sum: post-norm encoders.
NORMS = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "mpnet", "longformer"), "layer.N.output.LayerNorm"),
    "albert": "full_layer_layer_norm",
    "distilbert": "output_layer_norm",
}


def made(name: str) -> Any:
    """The family's model without any memory."""
    task, _, family = name.partition("/")
    family, _, variant = family.partition("+")
    case = Case(task, family, changes=CHANGES.get(variant or family, ()))
    with torch.device("meta"):
        return case.auto_class.from_config(case.config())


def numbered(name: str) -> str:
    return ".".join("N" if part.isdigit() and n != name.count(".") else part for n, part in enumerate(name.split(".")))


def ending(names: Collection[str], endings: str) -> set[str]:
    """Those of the names that end in whole components as one of the endings does; every ending means some."""
    found = {e: {n for n in names if f".{numbered(n)}".endswith(f".{e}")} for e in endings.split()}
    assert all(found.values()), [e for e, means in found.items() if not means]
    return set().union(*found.values())


def heads(model: Any) -> set[str]:
    return {n for n, m in model.named_modules() if m is model.get_output_embeddings()}


@pytest.mark.parametrize("name", ALL)
def test_the_scalings_mean_key_value_and_ffn_up_of_every_family(name: str) -> None:
    model = made(name)
    expected = ending(set(linear_names(model)) - heads(model), ALL[name][0])
    assert set(attached(attach(model, SubspaceConfig(method="ia3"))).layers) == expected


@pytest.mark.parametrize("name", ALL)
def test_the_adapters_stand_behind_every_attention_and_every_ffn(name: str) -> None:
    _, attention, ffn = ALL[name]
    model = made(name)
    if attention is None or ffn is None:
        with pytest.raises(UsageError, match=r"has a known name of an (attention|FFN) output"):
            attach(model, SubspaceConfig(method="houlsby"))
        return
    linear = set(linear_names(model)) - heads(model)
    expected = ending(linear, attention) | ending(linear, ffn)
    assert set(attached(attach(model, SubspaceConfig(method="houlsby"))).layers) == expected


OLD = {
    "masked-lm/mobilebert": ("houlsby", "bottleneck.attention.dense"),
    "causal-lm/zaya": ("pfeiffer", "gate.router_mlp.fc2"),
}


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_that_was_made_when_a_default_meant_more_layers_keeps_them(name: str) -> None:
    method, former = OLD[name]
    layers = [n for n in linear_names(made(name)) if n.endswith(former) or n.endswith("output.dense")]
    assert any(layer.endswith(former) for layer in layers)
    model = attach(made(name), SubspaceConfig(method=method), only=layers)
    assert {layer for layer in layers if layer.endswith(former)} <= set(attached(model).layers)


@pytest.mark.parametrize("family", NORMS)
def test_one_adapter_a_block_stands_around_the_norm_of_a_post_norm_encoder(family: str) -> None:
    model = made(f"masked-lm/{family}")
    norms = ending([n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()], NORMS[family])
    assert set(attached(attach(model, SubspaceConfig(method="pfeiffer"))).layers) == norms


def test_what_pefts_own_lists_scale_of_an_attention_is_scaled_here() -> None:
    """PEFT's lists of (IA)³, but for queries (which it takes in some families) and the FFN's input, which it scales instead."""
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    checked = 0
    for name, (scaled, *_) in ALL.items():
        family = name.partition("/")[2]
        ffn = theirs.get(family, [])[-1:]
        attention = [n for n in theirs.get(family, []) if n not in ffn and not n.startswith("q_")]
        own = {ending.rpartition(".")[2] for ending in scaled.split()}
        assert own.issuperset(attention), name
        checked += bool(attention)
    assert checked >= 14
