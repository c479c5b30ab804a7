"""Which layers are trained, on every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dist_subspace import SubspaceConfig, attach, load_adapter, save_adapter
from dist_subspace.errors import UsageError
from dist_subspace.subspace import attached, trainable_parameters
from tests.tiny_models import FAMILIES, tiny_config, tiny_model, vision_model

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
    config = tiny_config(f"{name}Config")
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


@pytest.mark.parametrize("entry", ["qproj", "mlp"])
def test_an_exclusion_that_leaves_nothing_out_is_refused(entry: str) -> None:
    """A misspelling, and a module around layers, whose name ends none of theirs."""
    with pytest.raises(UsageError, match=rf"exclude_modules has '{entry}', which names no layer; accepted: .*q_proj"):
        layers(tiny_model(), exclude_modules=["down_proj", entry])


def test_the_head_can_be_named() -> None:
    assert layers(tiny_model(), target_modules=["lm_head", "q_proj"])[-1] == "lm_head"


def test_nothing_matched_shows_names_that_exist() -> None:
    with pytest.raises(
        UsageError, match=r"target_modules is \['query'\], which matches no .*layers\.0\.self_attn\.q_proj"
    ):
        layers(tiny_model(), target_modules=["query"])
    with pytest.raises(UsageError, match=r"is 'all-linear' without \['q_proj'.*\], which matches no linear layer"):
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        layers(tiny_model(), target_modules="all-linear", exclude_modules=[*names])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("embed_tokens", "names Embedding and no linear layer; accepted: .*modules_to_save with 'embed_tokens'"),
        ("query", r"matches no linear layer; .*example: .*layers\.0\.self_attn\.q_proj"),
    ],
)
def test_a_name_beside_others_that_means_no_layer_is_refused(entry: str, said: str) -> None:
    """The others alone would train well, and not what was asked for."""
    with pytest.raises(UsageError, match=rf"target_modules has '{entry}', which {said}"):
        layers(tiny_model(), target_modules=["q_proj", entry])


def test_a_pattern_that_is_none_is_said() -> None:
    with pytest.raises(
        UsageError, match=r"target_modules is '\*q', which is no regular expression .*accepted: all-linear"
    ):
        layers(tiny_model(), target_modules="*q")


# docs/methods.md, "Published counts" (RoBERTa-base and -large; head apart), and the fixture's.

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
def test_blocks_in_which_nothing_is_a_linear_layer_are_spoken_of(family: str, said: list[str]) -> None:
    config = tiny_config(f"{family}Config", embedding_size=32)
    model = attach(getattr(transformers, f"{family}ForMaskedLM")(config), SubspaceConfig(method="lora", rank=2))
    assert not any(".layer" in name for name in attached(model).layers)
    assert "left out of all-linear" in " ".join(said) and "is no linear layer" in " ".join(said)


# What a default means and a family cannot have.


def family(name: str, auto: str = "CausalLM", **sizes: Any) -> Any:
    config = tiny_config(f"{name}Config", **sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{auto}").from_config(config)


QWEN_MOE = {
    "num_key_value_heads": 2,
    "num_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GATE = "model.layers.0.mlp.shared_expert_gate"


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("method", ["lora", "pissa", "vera"])
def test_a_layer_too_small_for_the_rank_is_left_out_of_a_default_and_said(
    method: str, targets: str | None, said: list[str]
) -> None:
    rank = None if method == "vera" else 8
    model = attach(family("Qwen2Moe", **QWEN_MOE), SubspaceConfig(method=method, rank=rank, target_modules=targets))
    chosen = attached(model).layers
    assert GATE not in chosen and "model.layers.0.mlp.shared_expert.up_proj" in chosen
    assert f"left out of all-linear: {GATE} and 1 like it; rank" in " ".join(said)
    assert attached(model).settings.rank > 1


def test_a_layer_too_small_for_the_rank_is_refused_where_the_user_named_it() -> None:
    for named in ({"target_modules": ["shared_expert_gate", "q_proj"]}, {"rank_pattern": {"shared_expert_gate": 4}}):
        with pytest.raises(UsageError, match=r"rank is \d, but .*shared_expert_gate is 1 x 32; accepted: at most 1"):
            attach(family("Qwen2Moe", **QWEN_MOE), SubspaceConfig(**{"rank": 8, **named}))
    with pytest.raises(UsageError, match="rank is 100, but"):
        attach(tiny_model(), SubspaceConfig(rank=100))


@pytest.mark.parametrize("method", ["lora", "ssl", "bitfit"])
@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Qwen2VL"])
def test_towers_that_text_never_reaches_are_left_out_and_every_tensor_gets_a_gradient(
    name: str, method: str, said: list[str]
) -> None:
    model = vision_model(f"{name}ForConditionalGeneration")
    tower = "visual" if name == "Qwen2VL" else "vision_tower"
    attach(model, SubspaceConfig(method=method, rank=None if method != "lora" else 2))
    assert attached(model).layers and not any(
        tower in layer or "projector" in layer for layer in attached(model).layers
    )
    assert method == "bitfit" or (tower in " ".join(said) and "text never reaches it" in " ".join(said))
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model))


def test_a_tower_can_be_named() -> None:
    model = attach(
        vision_model("LlavaForConditionalGeneration"), SubspaceConfig(rank=2, target_modules=r".*vision_tower.*q_proj")
    )
    assert all("vision_tower" in layer for layer in attached(model).layers)


MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 1}
OWN_NAMES: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "Falcon": ({}, "CausalLM", {"query_key_value", "dense_h_to_4h"}),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "CausalLM", {"Wqkv", "up_proj"}),
    "GPTBigCode": ({}, "CausalLM", {"attn.c_attn", "c_fc"}),
    "CTRL": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}, "CausalLM", {"Wk", "Wv", "ffn.0"}),
    "Phi3": ({"num_key_value_heads": 2}, "CausalLM", {"qkv_proj"}),
    "DeepseekV3": ({"q_lora_rank": 16, "kv_lora_rank": 16}, "CausalLM", {"kv_b_proj", "up_proj"}),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "CausalLM", {"k_proj", "v_proj", "w3"}),
    "XLNet": ({}, "CausalLM", {"layer_1"}),
    "Mamba2": (MAMBA2, "CausalLM", {"in_proj"}),
    "Longformer": (
        {"attention_window": 8},
        "MaskedLM",
        {"key", "value", "key_global", "value_global", "intermediate.dense"},
    ),
    "DebertaV2": ({}, "MaskedLM", {"key_proj", "value_proj", "intermediate.dense"}),
}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_the_scalings_know_the_names_of_every_family(name: str, said: list[str]) -> None:
    sizes, auto, wanted = OWN_NAMES[name]
    for method in ("ssl", "ssb", "ia3"):
        chosen = attached(attach(family(name, auto, **sizes), SubspaceConfig(method=method))).layers
        assert endings(chosen, wanted) == wanted
    words = {
        "Phi3": "gate_up_proj and 1 like it; it holds a gate too",
        "Mamba2": "the targets are its input projections",
    }
    assert words.get(name, "") in " ".join(said)


def test_a_family_without_any_such_name_is_refused_in_one_sentence() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"mix": torch.nn.Linear(4, 4)}) for _ in range(2))

    with pytest.raises(UsageError, match=r"is not given, and no layer .* key, value or FFN-up .*layers\.0\.mix"):
        attach(Strange(), SubspaceConfig(method="ssl"))


def test_an_adapter_of_fewer_layers_than_the_names_mean_now_is_loaded(tmp_path: Any) -> None:
    older, newer = (
        family("Lfm2", layer_types=["conv", "full_attention"]),
        family("Lfm2", layer_types=["conv", "full_attention"]),
    )
    attach(older, SubspaceConfig(method="ssl"), only=[f"model.layers.1.self_attn.{n}_proj" for n in "kv"])
    save_adapter(older, tmp_path / "adapter")
    assert attached(load_adapter(newer, tmp_path / "adapter")).layers == attached(older).layers
    assert len(attached(older).layers) == 2


def bart(auto: str) -> Any:
    return getattr(transformers, auto)(tiny_config("BartConfig"))


def gpt2_that_may_look_elsewhere() -> Any:
    return tiny_model("GPT2LMHeadModel", n_layer=1, add_cross_attention=True)


def luke() -> Any:
    config = tiny_config("LukeConfig", num_hidden_layers=1, entity_vocab_size=9, entity_emb_size=8)
    return transformers.LukeForMaskedLM(config)


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: bart("BartForCausalLM"), "encoder_attn"),
        (gpt2_that_may_look_elsewhere, "crossattention"),
        (luke, "e2w_query"),
    ],
)
def test_layers_for_inputs_other_than_text_have_no_method_unless_named(make: Any, part: str, said: list[str]) -> None:
    model = attach(make(), SubspaceConfig(method="lora", rank=2))
    assert f".{part}" in " ".join(said) and "text never reaches it" in " ".join(said)
    assert not any(f".{part}" in name for name in attached(model).layers)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
    named = attach(make(), SubspaceConfig(method="lora", rank=2, target_modules=rf".*\.{part}(\..*)?"))
    assert all(f".{part}" in name for name in attached(named).layers)


def test_the_cross_attention_of_two_stacks_is_reached() -> None:
    model = attach(bart("BartForConditionalGeneration"), SubspaceConfig(method="lora", rank=2))
    assert any(".encoder_attn.k_proj" in name for name in attached(model).layers)


def test_a_router_that_is_called_as_heads_are_is_spoken_of(said: list[str]) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4, "num_experts": 2}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
    config = tiny_config("SwitchTransformersConfig", **sizes, **sparse)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    attach(model, SubspaceConfig(method="lora", rank=2))
    assert "router.classifier" in " ".join(said) and "it has the name of an output layer" in " ".join(said)


def jetmoe() -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "kv_channels": 8}
    return tiny_model("JetMoeForCausalLM", config_name="JetMoeConfig", **sizes)


def test_routers_that_are_linear_layers_are_left_alone_unless_they_are_named(said: list[str]) -> None:
    model = attach(jetmoe(), SubspaceConfig(method="lora", rank=2))
    assert model.subspace.layers and not [name for name in model.subspace.layers if "router" in name]
    assert "it is a router; accepted for who wants it trained" in " ".join(said)
    named = attach(jetmoe(), SubspaceConfig(method="lora", rank=2, target_modules=["router.layer"]))
    assert all("router.layer" in name for name in named.subspace.layers)


def test_a_router_that_is_no_linear_layer_is_named_for_training_in_full(said: list[str]) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    mixtral = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes)
    sentence = (
        "has 'gate', which names the router model.layers.0.mlp.gate, a MixtralTopKRouter and no linear layer; accepted: "
        "subspace.modules_to_save with 'gate'"
    )
    for targets in (["gate"], ["q_proj", "gate"]):
        with pytest.raises(UsageError, match=sentence):
            attach(mixtral, SubspaceConfig(method="lora", rank=2, target_modules=targets))
    trained = attach(mixtral, SubspaceConfig(method="lora", rank=2, modules_to_save=["mlp.gate"]))
    assert sum(".mlp.gate.trained." in n for n, p in trained.named_parameters() if p.requires_grad) == 2
