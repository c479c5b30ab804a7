"""transformers' private names are where they were: a failure here says what to mend in transformers_internals.py."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import modeling_utils

from dist_subspace.loading import transformers_internals as internals
from tests.tiny_models import FAMILIES, tiny_config, tiny_model

MEND = "see dist_subspace/loading/transformers_internals.py"


def test_the_names_that_are_used_are_there() -> None:
    from transformers import conversion_mapping, core_model_loading, initialization

    assert hasattr(initialization, "no_init_weights"), MEND
    assert hasattr(conversion_mapping, "get_model_conversion_mapping"), MEND
    assert hasattr(core_model_loading.WeightRenaming, "rename_source_key"), MEND
    assert hasattr(core_model_loading.WeightRenaming, "reverse_transform"), MEND
    assert hasattr(core_model_loading, "PrefixChange"), MEND
    assert hasattr(modeling_utils.PreTrainedModel, "_init_weights"), MEND
    assert hasattr(modeling_utils.PreTrainedModel, "base_model_prefix"), MEND
    for name in ("_get_dtype_plan", "_adjust_missing_and_unexpected_keys", "get_expanded_tied_weights_keys"):
        assert hasattr(modeling_utils.PreTrainedModel, name), MEND
    assert hasattr(initialization, "no_tie_weights"), MEND
    assert hasattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref"), MEND
    assert list(inspect.signature(core_model_loading.rename_source_key).parameters)[:5] == [
        *("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")
    ], MEND


@pytest.mark.parametrize("name", FAMILIES)
def test_a_skeleton_has_no_weights_and_real_buffers(name: str) -> None:
    auto = {"causal-lm": "CausalLM", "classification": "SequenceClassification", "masked-lm": "MaskedLM"}
    kind = getattr(transformers, f"AutoModelFor{auto.get(FAMILIES[name][1], 'Seq2SeqLM')}")
    skeleton = internals.build_skeleton(kind, tiny_config(FAMILIES[name][0]), torch.bfloat16)
    real = tiny_model(name)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in skeleton.parameters()), MEND
    shapes = {n: p.shape for n, p in real.named_parameters(remove_duplicate=False)}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == shapes, f"nothing is tied yet; {MEND}"
    for (buffer_name, buffer), (_, expected) in zip(skeleton.named_buffers(), real.named_buffers(), strict=True):
        assert not buffer.is_meta and torch.equal(buffer.float(), expected.float()), (buffer_name, MEND)


def test_the_marks_of_quantisation_that_trainer_looks_at_are_taken_away() -> None:
    from transformers import trainer_utils

    assert "is_quantized" in inspect.getsource(trainer_utils), f"Trainer looks at another mark now; {MEND}"
    model = tiny_model()
    model.is_quantized = True
    model.hf_quantizer = object()
    model.is_loaded_in_4bit = True
    model.config.quantization_config = {"load_in_4bit": True}
    internals.forget_quantization(model)
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer") and not getattr(model, "is_loaded_in_4bit", False)


def test_initial_values_are_the_familys_own_and_a_function_of_the_seed() -> None:
    model = tiny_model("BertForSequenceClassification", num_labels=96)
    before = model.bert.pooler.dense.weight.clone()
    internals.initialise(model, model.classifier, 5)
    first = model.classifier.weight.clone()
    assert abs(first.std().item() - model.config.initializer_range) < 0.002 and not model.classifier.bias.any(), MEND
    internals.initialise(model, model.classifier, 5)
    assert torch.equal(model.classifier.weight, first)
    assert torch.equal(model.bert.pooler.dense.weight, before)


def test_families_that_renamed_their_modules_are_known() -> None:
    plan = internals.key_plan(tiny_model("GPTNeoXForCausalLM"), ["embed_out.weight", "gpt_neox.embed_in.weight"])
    assert plan.direct == {
        "lm_head.weight": ["embed_out.weight"],
        "gpt_neox.embed_in.weight": ["gpt_neox.embed_in.weight"],
    }, MEND
    bert = internals.key_plan(tiny_model("BertForMaskedLM"), ["bert.embeddings.LayerNorm.gamma", "bert.nothing"])
    assert bert.direct == {"bert.embeddings.LayerNorm.weight": ["bert.embeddings.LayerNorm.gamma"]}, MEND
    assert bert.unused == {"bert.nothing": "bert.nothing"}, MEND


def test_the_keys_of_a_body_and_of_a_head_model_find_each_other() -> None:
    body, whole = tiny_model("GPT2Model", config_name="GPT2Config"), tiny_model("GPT2LMHeadModel")
    assert internals.key_plan(whole, ["h.0.ln_1.bias"]).direct == {"transformer.h.0.ln_1.bias": ["h.0.ln_1.bias"]}, MEND
    assert internals.key_plan(body, ["transformer.wte.weight"]).direct == {"wte.weight": ["transformer.wte.weight"]}, (
        MEND
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_written_under_the_keys_that_transformers_writes(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    written = internals.written_keys(model, [n for n, _ in model.named_parameters()])
    assert set(written.values()) == set(load_file(tmp_path / "model.safetensors")), MEND


def test_a_model_class_tells_its_parameters_for_another_configuration() -> None:
    model = tiny_model()
    expected = internals.expected_parameters(model, tiny_config("LlamaConfig", mlp_bias=True))
    assert all(p.is_meta for p in expected.values()) and expected["model.layers.0.mlp.up_proj.bias"].shape == (44,), (
        MEND
    )
    assert expected.keys() - {n for n, _ in model.named_parameters(remove_duplicate=False)} == {
        f"model.layers.{n}.mlp.{p}_proj.bias" for n in (0, 1) for p in ("up", "down", "gate")
    }
    assert expected["lm_head.weight"] is expected["model.embed_tokens.weight"], MEND
    untied = internals.expected_parameters(model, tiny_config("LlamaConfig", tie_word_embeddings=False))
    assert untied["lm_head.weight"] is not untied["model.embed_tokens.weight"], MEND


def test_the_prefix_of_a_body_is_known() -> None:
    assert internals.base_prefix(tiny_model("GPT2LMHeadModel")) == "transformer", MEND
    assert internals.base_prefix(nn.Linear(1, 1)) == ""


def test_empty_parameters_are_tied_as_the_file_asks_for() -> None:
    auto = transformers.AutoModelForCausalLM
    for missing, one in (({"lm_head.weight"}, True), ({"model.embed_tokens.weight"}, True), (set(), False)):
        skeleton = internals.build_skeleton(auto, tiny_config("LlamaConfig"), torch.float32)
        assert internals.tied_pairs(skeleton) == {"lm_head.weight": "model.embed_tokens.weight"}, MEND
        internals.tie(skeleton, missing)
        assert (skeleton.lm_head.weight is skeleton.model.embed_tokens.weight) == one, MEND
        assert bool(internals.tied_pairs(skeleton)) == one == skeleton.config.tie_word_embeddings, MEND


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("Mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("Qwen3Moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("GraniteMoe", None),
        ("GptOss", None),
    ],
)
def test_a_stack_is_split_into_the_tensors_that_transformers_writes(name: str, first: str, tmp_path: Path) -> None:
    sizes = {
        "num_local_experts": 11,
        "num_experts": 11,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = tiny_config(f"{name}Config", moe_intermediate_size=12, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    splits = internals.split_stacks(model, config, shapes)
    assert (first is not None) == bool(splits) and (first is None or first in written), MEND
    for stack, split in splits.items():
        made = split(model.get_parameter(stack).detach())
        planned = split(torch.empty(shapes[stack], device="meta"))
        assert list(made) == list(planned) and len(made) % 11 == 0
        assert all(torch.equal(tensor, written[key]) for key, tensor in made.items()), MEND
        assert {key: t.shape for key, t in made.items()} == {key: t.shape for key, t in planned.items()}
    keys = {n: [k] for n, k in internals.written_keys(model, shapes).items() if n not in splits}
    of_stacks = {n: list(split(torch.empty(shapes[n], device="meta"))) for n, split in splits.items()}
    assert {k for own in (keys | of_stacks).values() for k in own} == written.keys()
    assert not internals.misread(model, config, keys | of_stacks, list(splits)), MEND
    if splits:
        assert internals.misread(model, config, keys | of_stacks, []) == list(splits)
