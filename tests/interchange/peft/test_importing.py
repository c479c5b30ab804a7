"""What PEFT wrote computes the same here as in PEFT; what is not known is refused by its name, and the model left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG, WEIGHTS
from dist_subspace.interchange.peft.importing import read_peft, rewrite_peft
from dist_subspace.interchange.tensor_names import current_key
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import attached, attachment
from tests.interchange.peft.adapters import GPT2, LINEAR, LLAMA, assert_imported, assert_near, lora, pruned, written
from tests.tiny_models import logits, tiny_model

NOT_ON_CONV1D = ("miss", "oft")
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}


LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("lora", {}),
    "gaussian": ("lora", {"init_lora_weights": "gaussian"}),
    "rslora": ("rslora", {"use_rslora": True}),
    "dora": ("dora", {"use_dora": True}),
    "dora and rslora": ("dora", {"use_dora": True, "use_rslora": True}),
    "patterns": (
        "lora",
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"v_proj": 9}},
    ),
    "patterns and rslora": (
        "rslora",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True},
    ),
    "patterns, dora, rslora": ("dora", {"rank_pattern": {"q_proj": 2}, "use_dora": True, "use_rslora": True}),
    "a pattern for targets": ("lora", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "all-linear": ("lora", {"target_modules": "all-linear"}),
    "one layer": ("lora", {"layers_to_transform": [1]}),
    "a head in full": ("lora", {"modules_to_save": ["lm_head"]}),
    "pissa": ("pissa", {"init_lora_weights": "pissa"}),
    "pissa and rslora": ("pissa", {"init_lora_weights": "pissa", "use_rslora": True}),
    "olora": ("olora", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("case", LORAS)
def test_a_lora_of_peft_has_the_same_logits(case: str, tmp_path: Path) -> None:
    method, fields = LORAS[case]
    if method not in dsub.methods():
        pytest.skip(f"{method} is not registered")
    folder, expected = written(tmp_path, lora(**fields), tie_word_embeddings=False)
    tolerance = 1e-4 if method in ("pissa", "olora") else 1e-5
    assert_imported(tiny_model(tie_word_embeddings=False), folder, expected, method, tolerance)


OTHERS: dict[str, tuple[str, Any]] = {
    "adalora": ("adalora", peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10)),
    "ia3": ("ia3", peft.IA3Config(feedforward_modules=["down_proj", "mlp.c_proj"])),
    "ia3 by a pattern": ("ia3", peft.IA3Config(feedforward_modules=r".*(down_proj|mlp\.c_proj)")),
    "ia3 of outputs": ("ia3", peft.IA3Config(feedforward_modules=[])),
    "vera": ("vera", peft.VeraConfig(r=7, projection_prng_key=3)),
    "vera by its seed": ("vera", peft.VeraConfig(r=7, projection_prng_key=3, save_projection=False)),
    "miss": ("miss", peft.MissConfig(r=5, miss_dropout=0.1)),
    "miss with few columns": ("miss", peft.MissConfig(r=5, mini_r=4, init_weights="mini")),
    "oft": ("oft", peft.OFTConfig(oft_block_size=8, module_dropout=0.2)),  # of 44 inputs it is 11
    "oft by its default": ("oft", peft.OFTConfig()),
    "oft of one shared block": ("oft", peft.OFTConfig(oft_block_size=4, block_share=True, num_cayley_neumann_terms=3)),
    "oft without the series": ("oft", peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False)),
    "oft of two terms": ("oft", peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2)),
    "prompt": ("prompt", peft.PromptTuningConfig(**TOKENS)),
    "p-tuning": ("p-tuning", peft.PromptEncoderConfig(**TOKENS, encoder_hidden_size=6)),
    "p-tuning by an LSTM": (
        "p-tuning",
        peft.PromptEncoderConfig(**TOKENS, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"),
    ),
    "prefix": ("prefix", peft.PrefixTuningConfig(**TOKENS)),
    "prefix by a projection": (
        "prefix",
        peft.PrefixTuningConfig(**TOKENS, prefix_projection=True, encoder_hidden_size=6),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("name", [LLAMA, GPT2])
def test_every_other_kind_of_peft_has_the_same_logits(case: str, name: str, tmp_path: Path) -> None:
    method, config = copy.deepcopy(OTHERS[case])  # PEFT writes the model's sizes into it
    if method not in dsub.methods():
        pytest.skip(f"{method} is not registered")
    if method in NOT_ON_CONV1D and name == GPT2:
        pytest.skip(f"PEFT has no {method} on Conv1D")
    if not config.is_prompt_learning:
        targets = {**LINEAR, LLAMA: ["k_proj", "v_proj", "down_proj"]} if method == "ia3" else LINEAR
        config.target_modules = set(targets[name])
        config.task_type = "CAUSAL_LM"
        if method == "ia3" and isinstance(config.feedforward_modules, set):
            config.feedforward_modules &= config.target_modules
    folder, expected = written(tmp_path, config, name)
    assert_imported(tiny_model(name), folder, expected, method)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_conv1d_layers_are_read_as_what_they_compute(fields: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = written(tmp_path, lora(target_modules=LINEAR[GPT2], fan_in_fan_out=True, **fields), GPT2)
    method = "dora" if "use_dora" in fields else "pissa" if fields else "lora"
    assert_imported(tiny_model(GPT2), folder, expected, method, 1e-4)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration", "OPTForCausalLM"])
def test_other_families_and_their_trained_heads(name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "BertForSequenceClassification": {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"},
        "T5ForConditionalGeneration": {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"},
        "OPTForCausalLM": {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["final_layer_norm"]},
    }
    folder, expected = written(tmp_path, lora(**fields[name]), name)
    model = assert_imported(tiny_model(name), folder, expected, "lora")
    if name.startswith("Bert"):
        assert attached(model).saved_modules == ("classifier",)


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
def test_any_storage_takes_it(storage: str, tmp_path: Path) -> None:
    """Beside Ŵ it computes what it computes beside the dense Ŵ."""
    folder, _ = written(tmp_path / "peft", lora())
    tiny_model().save_pretrained(tmp_path / "base")
    dtype = None if storage == "bf16" else "float32"
    model = dsub.import_peft(dsub.load_frozen(tmp_path / "base", storage=storage, dtype=dtype), folder)
    plain = tiny_model().to(model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            plain.get_submodule(name.removesuffix(".base")).weight.data = module.dense(model.dtype)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    tolerance = 5e-2 if storage == "bf16" else 1e-5
    assert_near(logits(model).float(), logits(theirs).float(), tolerance)


@pytest.mark.skipif("adalora" not in dsub.methods(), reason="adalora is not registered")
def test_layers_that_adalora_has_shortened_get_their_triplets_back_as_zeros(tmp_path: Path) -> None:
    folder, expected = pruned(tmp_path)
    ranks = {t.shape[0] for key, t in load_file(folder / WEIGHTS).items() if key.endswith("lora_A")}
    assert len(ranks) > 1, "nothing was pruned"
    model = dsub.import_peft(tiny_model(), folder)
    assert_near(logits(model), expected)
    assert {len(m.lora_E) for m in model.modules() if hasattr(m, "lora_E")} == {4}


@pytest.mark.parametrize("form", ["direct", "auto"])
def test_a_shortened_adalora_that_was_imported_goes_back_to_peft(form: str, tmp_path: Path) -> None:
    folder, expected = pruned(tmp_path / "peft")
    rewrite_peft(folder, tmp_path / "own")
    assert_near(logits(dsub.load_adapter(tiny_model(), tmp_path / "own")), expected)
    dsub.export_peft(tmp_path / "own", tmp_path / "back", form, report=None)
    assert_near(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "back").eval()), expected)


@pytest.mark.parametrize("case", ["plain", "dora", "patterns"])
def test_it_comes_back_as_it_went(case: str, tmp_path: Path) -> None:
    """PEFT's adapter, read here and exported again, is the same adapter to PEFT."""
    method, fields = LORAS[case]
    folder, expected = written(tmp_path / "peft", lora(**fields))
    model = dsub.import_peft(tiny_model(), folder)
    dsub.export_peft(model, tmp_path / "back", "direct", report=None)
    assert_near(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "back").eval()), expected)
    first = {current_key(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    second = load_file(tmp_path / "back" / WEIGHTS)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-6, atol=1e-6)
    dsub.save_adapter(model, tmp_path / "own")
    assert_near(logits(dsub.load_adapter(tiny_model(), tmp_path / "own")), expected)
    assert method == attached(model).info.name


# Refusals: one sentence, and the model as it was.


def changed(folder: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """A saved plain LoRA with other entries or tensors."""
    written(folder, lora())
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    if tensors is not None:
        held = load_file(folder / WEIGHTS)
        save_file({k: t for k, t in {**held, **tensors}.items() if t.numel()}, folder / WEIGHTS)
    return folder


def refused(folder: Path, message: str, **changes: Any) -> None:
    model = tiny_model(**changes)
    before = logits(model)
    with pytest.raises(UsageError, match=message):
        dsub.import_peft(model, folder)
    assert attachment(model) is None and torch.equal(logits(model), before)
    assert not any(isinstance(m, FrozenLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type is 'LOHA'.*; accepted: ADALORA, IA3, LORA, MISS, OFT, PREFIX_TUNING,",
        ),
        ({"peft_type": None}, "peft_type is None; accepted: ADALORA, IA3, LORA"),
        (
            {"layer_replication": [[0, 2]]},
            r"layer_replication is \[\[0, 2\]\], which is not known here; accepted: a LORA",
        ),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is .*, which is not known here"),
        ({"a_field_of_tomorrow": 7}, "a_field_of_tomorrow is 7, which is not known here"),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights is 'corda', whose base is not the base model alone; accepted: True",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', whose base is not the base model alone"),
        ({"r": 4}, "holds rank 3 for .*, but its configuration says 4; it is damaged"),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_its_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(changed(tmp_path, **fields), message)


def test_an_entry_of_another_kind_is_refused(tmp_path: Path) -> None:
    """What OFT reads is nothing that a LoRA has."""
    refused(
        changed(tmp_path, oft_block_size=4), "oft_block_size is 4, which is not known here; accepted: a LORA adapter"
    )


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{LAYER}.lora_B.bias": torch.ones(32)},
            r"holds .*q_proj\.lora_B\.bias, which is not known here; accepted: of lin",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 96)},
            "lora_embedding_A, which is not known",
        ),
        ({"base_model.model.lm_head.weight": torch.ones(96, 32)}, r"lm_head\.weight, which is not known here"),
        (
            {f"{LAYER}.lora_A.weight": torch.empty(0)},
            r"lacks lora_A\.weight of model\.layers\.0\.self_attn\.q_proj; it was not",
        ),
    ],
)
def test_a_tensor_that_is_not_known_or_missing_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    refused(changed(tmp_path, tensors), message)


def test_an_adapter_for_another_base_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "llama", lora())
    refused(
        folder, r"for a model\.layers\.0\.mlp\.down_proj of 32 x 44, but this model's is 32 x 40", intermediate_size=40
    )
    model = tiny_model(GPT2)
    with pytest.raises(
        UsageError, match=r"for model\.layers\.0\..*, which is no linear layer of this model \(GPT2LMHeadModel\)"
    ):
        dsub.import_peft(model, folder)
    assert attachment(model) is None


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_for_another_base_are_refused_before_the_model_is_touched(kind: str, tmp_path: Path) -> None:
    if kind not in dsub.methods():
        pytest.skip(f"{kind} is not registered")
    folder, _ = written(tmp_path, copy.deepcopy(OTHERS[kind][1]))
    if kind == "prompt":
        refused(folder, "for a width of 32, but this model's is 64", hidden_size=64)
    else:
        refused(folder, "for a number of layers of 2, but this model's is 3", num_hidden_layers=3)


def test_virtual_tokens_of_other_tasks_are_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, copy.deepcopy(OTHERS["prompt"][1]))
    file = folder / CONFIG
    stored = json.loads(file.read_text())
    for fields, message in (
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; accepted for PROMPT_TUNING: CAUSAL_LM, SEQ_2_SEQ_LM"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2, one of them the decoder's; accepted: 1"),
    ):
        file.write_text(json.dumps(stored | fields))
        refused(folder, message)


def test_a_head_that_peft_trained_apart_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, lora(modules_to_save=["lm_head"]))
    refused(
        folder, r"holds lm_head trained apart from model\.embed_tokens, to which this model ties it; accepted: a base"
    )


def test_a_folder_without_an_adapter_is_said(tmp_path: Path) -> None:
    refused(tmp_path, f"holds no adapter of PEFT; looked for {CONFIG} and {WEIGHTS}")
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    (tmp_path / CONFIG).write_text("{}")
    refused(tmp_path, "its weights are a pickle, which runs code when read")
    whole = changed(tmp_path / "cut")
    (whole / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes()[:-9])
    refused(whole, "holds no whole adapter .*; copy it again")
    (whole / CONFIG).write_text("{")
    refused(whole, "holds no whole adapter .*; copy it again")


def test_an_adapter_of_our_own_is_told_apart(tmp_path: Path) -> None:
    dsub.save_adapter(dsub.attach(tiny_model()), tmp_path)
    refused(tmp_path, "is an adapter of dist_subspace; load_adapter reads it")


def test_reading_needs_no_model(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, lora(use_rslora=True))
    imported = read_peft(folder)
    assert imported.config.method == "rslora" and imported.config.rank == 3 and imported.config.alpha == 5.0
    assert imported.shapes["model.layers.0.mlp.up_proj"] == (44, 32) and imported.made_from_base is None
