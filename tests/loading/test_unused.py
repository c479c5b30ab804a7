"""Tensors of a checkpoint without a place in the model: silent where they are harmless, said, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.notices import heard
from tests.tiny_models import FAMILIES, logits, tiny_config, tiny_model

Tensors = dict[str, Tensor]
LLAMA = "model.layers.0.self_attn.q_proj"


def folder_of(path: Path, name: str, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A family's folder with other tensors."""
    tiny_model(name, **config).save_pretrained(path)
    write(path, change(load_file(path / "model.safetensors")))
    return path


def write(path: Path, tensors: Tensors) -> None:
    apart = {key: tensor.clone() for key, tensor in tensors.items()}  # safetensors takes no tensor under two names
    save_file(apart, path / "model.safetensors", metadata={"format": "pt"})


def added(**extra: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | extra


def renamed(pattern: str) -> Callable[[Tensors], Tensors]:
    """Every key in a wrapper's form; `{owner}` and `{own}` are the two parts of a key."""

    def change(tensors: Tensors) -> Tensors:
        parts = {key: key.rpartition(".") for key in tensors}
        return {pattern.format(key=key, owner=parts[key][0], own=parts[key][2]): t for key, t in tensors.items()}

    return change


def scaled(name: str) -> Callable[[Tensors], Tensors]:
    """Matrices in eight bits, with their scale under the name."""

    def change(tensors: Tensors) -> Tensors:
        matrices = [key for key in tensors if key.endswith("_proj.weight")]
        low = {key: tensors[key].to(torch.float8_e4m3fn) for key in matrices}
        return tensors | low | {key.removesuffix("weight") + name: torch.full((1, 1), 0.1) for key in matrices}

    return change


V = torch.ones(32)
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "an attention bias": ("LlamaForCausalLM", added(**{f"{LLAMA}.bias": V}), r"q_proj\.bias: biases of layers .*true"),
    "a bias of the MLP": (
        "MistralForCausalLM",
        added(**{"model.layers.1.mlp.up_proj.bias": torch.ones(44)}),
        "mlp_bias",
    ),
    "a bias of a norm": ("LlamaForCausalLM", added(**{"model.norm.bias": V}), r"model\.norm\.bias: biases of layers"),
    "a bias in T5": (
        "T5ForConditionalGeneration",
        added(**{"encoder.block.0.layer.0.SelfAttention.q.bias": V}),
        r"q\.bias: biases of layers that have none by config\.json",
    ),
    "fp8 by blocks": ("LlamaForCausalLM", scaled("weight_scale_inv"), "weight_scale_inv .*no quantization_config"),
    "fp8 by tensors": ("Qwen2ForCausalLM", scaled("weight_scale"), "weight_scale .*no quantization_config"),
    "fp8 of activations": ("LlamaForCausalLM", scaled("input_scale"), "input_scale .*no quantization_config"),
    "bitsandbytes in 4 bits": (
        "LlamaForCausalLM",
        added(**{f"{LLAMA}.weight.absmax": V, f"{LLAMA}.weight.quant_state.bitsandbytes__nf4": V}),
        r"absmax, .*: scales of quantised weights",
    ),
    "bitsandbytes in 8 bits": ("OPTForCausalLM", added(**{"model.decoder.layers.0.fc1.SCB": V}), "SCB: scales of"),
    "LoRA": (
        "LlamaForCausalLM",
        added(**{f"{LLAMA}.lora_A.weight": torch.ones(2, 32), f"{LLAMA}.lora_B.weight": torch.ones(32, 2)}),
        r"lora_A\.weight, .*: parts of an adapter.*merge_and_unload",
    ),
    "LoRA of a PEFT model": (
        "GPT2LMHeadModel",
        added(**{"base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight": torch.ones(2, 32)}),
        "parts of an adapter",
    ),
    "DoRA": (
        "BertForMaskedLM",
        added(**{"bert.encoder.layer.0.output.dense.lora_magnitude_vector.weight": V}),
        "merge it",
    ),
    "a saved PEFT base": ("LlamaForCausalLM", renamed("{owner}.base_layer.{own}"), "names of a wrapped model"),
    "torch.compile": (
        "LlamaForCausalLM",
        renamed("_orig_mod.{key}"),
        r"_orig_mod\..*: names of a wrapped model .*strip",
    ),
    "DDP": ("GPT2LMHeadModel", renamed("module.{key}"), r"module\.transformer\..*: names of a wrapped model"),
    "DDP of a compiled model": ("T5ForConditionalGeneration", renamed("module._orig_mod.{key}"), "names of a wrapped"),
    "FSDP": (
        "LlamaForCausalLM",
        renamed("_fsdp_wrapped_module.{key}"),
        r"_fsdp_wrapped_module\..*: names of a wrapped",
    ),
    "checkpointed blocks": (
        "LlamaForCausalLM",
        renamed("{owner}._checkpoint_wrapped_module.{own}"),
        "names of a wrapped",
    ),
    "VeRA": (
        "LlamaForCausalLM",
        added(**{f"{LLAMA}.vera_lambda_b.default": V}),
        "vera_lambda_b.default: parts of an adapter",
    ),
    "the rows of AdaLoRA": ("LlamaForCausalLM", added(**{f"{LLAMA}.ranknum.default": V}), "parts of an adapter"),
    "GPTQ": (
        "LlamaForCausalLM",
        added(**{f"{LLAMA}.qweight": V, f"{LLAMA}.qzeros": V}),
        "qweight, .*: scales of quant",
    ),
    "codes in 8 bits": ("LlamaForCausalLM", added(**{f"{LLAMA}.CB": V}), "CB: scales of quantised weights"),
    "a second copy": ("BertForMaskedLM", lambda t: t | renamed("module.{key}")(t), "names of a wrapped model"),
    "a parameter of attention": ("LlamaForCausalLM", added(**{"model.layers.0.self_attn.sinks": V}), "something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_that_changes_what_a_module_computes_is_refused(case: str, tmp_path: Path) -> None:
    name, change, sentence = REFUSED[case]
    folder_of(tmp_path, name, change)
    with pytest.raises(UsageError, match=sentence) as caught:
        dsub.load_frozen(tmp_path, task=FAMILIES[name][1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("LlamaForCausalLM", "num_hidden_layers"),
        ("GPT2LMHeadModel", "n_layer"),
        ("BertForMaskedLM", "num_hidden_layers"),
        ("T5ForConditionalGeneration", "num_decoder_layers"),
        ("OPTForCausalLM", "num_hidden_layers"),
    ],
)
def test_layers_beyond_the_configurations_are_refused(name: str, field: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"\.1\..*: layers beyond those of config\.json.*set num_hidden_layers"):
        dsub.load_frozen(tmp_path, task=FAMILIES[name][1], **{field: 1})


def test_the_biases_of_a_configuration_that_was_changed_are_refused(tmp_path: Path) -> None:
    tiny_model(attention_bias=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"bias and 5 more: biases of layers that have none"):
        dsub.load_frozen(tmp_path, attention_bias=False)
    dsub.load_frozen(tmp_path)


MASK = torch.ones(1, 1, 64, 64, dtype=torch.bool)
HARMLESS: dict[str, tuple[str, Tensors]] = {
    "old GPT-2": ("GPT2LMHeadModel", {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": V[0]}),
    "old Llama": ("LlamaForCausalLM", {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "old BERT": ("BertForMaskedLM", {"bert.embeddings.position_ids": torch.arange(64)[None]}),
    "old GPT-NeoX": (
        "GPTNeoXForCausalLM",
        {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": V[0]}
        | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)},
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_older_versions_saved_beside_the_weights_is_silent(case: str, tmp_path: Path) -> None:
    name, extra = HARMLESS[case]
    folder_of(tmp_path, name, added(**extra))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = dsub.load_frozen(tmp_path, storage="fp32", task=FAMILIES[name][1])
    torch.testing.assert_close(logits(model), logits(tiny_model(name)), rtol=1e-5, atol=1e-5)


def deepseek(path: Path, **extra: Tensor) -> Path:
    """A family whose list names the layer that it leaves out (61), and whose configuration may name one."""
    made = tiny_config("DeepseekV3Config", num_nextn_predict_layers=0)
    transformers.DeepseekV3ForCausalLM(made).save_pretrained(path)
    write(path, load_file(path / "model.safetensors") | extra)
    return path


def told(path: Path, **arguments: Any) -> list[str]:
    sentences: list[str] = []
    with heard(sentences.append):
        dsub.load_frozen(path, storage="bf16", **arguments)
    return sentences


def test_layers_that_a_familys_list_or_its_configuration_leaves_out_are_not_refused(tmp_path: Path) -> None:
    deepseek(tmp_path / "a", **{"model.layers.61.eh_proj.weight": V})
    assert told(tmp_path / "a") == []
    deepseek(tmp_path / "b", **{"model.layers.2.eh_proj.weight": V})
    with pytest.raises(UsageError, match=r"model\.layers\.2\.eh_proj\.weight: layers beyond"):
        told(tmp_path / "b")
    (said,) = told(tmp_path / "b", num_nextn_predict_layers=1)
    assert said.endswith("which are not read: model.layers.2 (1 tensor)")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    assert told(tmp_path / "b") == [said], "the name that Qwen has for it"


@pytest.mark.parametrize(
    ("name", "task", "extra", "said"),
    [
        ("LlamaForCausalLM", "causal-lm", {"vision_tower.layers.0.q.weight_scale": V}, r"vision_tower \(1 tensor\)"),
        (
            "LlamaForCausalLM",
            "causal-lm",
            {"model.vision_model.a.weight": V, "model.vision_model.b": V},
            r"\(2 tensors\)",
        ),
        ("LlamaForCausalLM", "causal-lm", {"score.weight": V, "mtp.layers.0.weight": V}, r"mtp \(1 tensor\), score"),
        ("Qwen2ForCausalLM", "base", {}, r"Qwen2Model has no place for.*: lm_head \(1 tensor\)"),
        ("BertForMaskedLM", "classification", {}, r"cls \(\d tensors\)"),
    ],
)
def test_whole_modules_that_the_class_lacks_are_said(
    name: str, task: str, extra: Tensors, said: str, tmp_path: Path
) -> None:
    folder_of(tmp_path, name, added(**extra))
    with pytest.warns(UserWarning, match=f"which are not read: .*{said}|{said}") as caught:
        dsub.load_frozen(tmp_path, storage="bf16", task=task)
    assert len(caught) == 1


def test_two_tensors_for_one_parameter_must_be_the_same(tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> Tensors:
        return tensors | {
            "embed_out.weight": tensors["embed_out.weight"],
            "lm_head.weight": tensors["embed_out.weight"] * factor,
        }

    factor = 1.0
    folder_of(tmp_path, "GPTNeoXForCausalLM", twice, tie_word_embeddings=False)
    dsub.load_frozen(tmp_path)
    factor = 2.0
    folder_of(tmp_path, "GPTNeoXForCausalLM", twice, tie_word_embeddings=False)
    with pytest.raises(UsageError, match=r"with different values, and both are the model's lm_head\.weight; remove"):
        dsub.load_frozen(tmp_path)
