"""PEFT's own rules: what it leaves to a default, ignores or writes beside, an import reads as PEFT does, on every way in."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG, WEIGHTS
from dist_subspace.interchange.peft.importing import rewrite_peft
from dist_subspace.subspace import attachment
from tests.interchange.peft.adapters import LINEAR, LLAMA, lora, written
from tests.interchange.trained import frozen, saved_base, trained
from tests.tiny_models import logits, tiny_model

QWEN = "Qwen2ForCausalLM"  # whose head is not tied


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def both_ways(folder: Path, out: Path, expected: Tensor, name: str = LLAMA, **changes: Any) -> None:
    """With the base at hand, and by the command without it: what PEFT computes."""
    assert_near(logits(dsub.import_peft(tiny_model(name, **changes), folder)), expected)
    rewrite_peft(folder, out)
    assert_near(logits(dsub.load_adapter(tiny_model(name, **changes), out)), expected)


def refused_both_ways(folder: Path, out: Path, message: str, name: str = LLAMA, **changes: Any) -> None:
    model = tiny_model(name, **changes)
    with pytest.raises(UsageError, match=message):
        dsub.import_peft(model, folder)
    assert attachment(model) is None
    with pytest.raises(UsageError, match=message):
        rewrite_peft(folder, out)
        dsub.load_adapter(model, out)
    assert attachment(model) is None


def without(folder: Path, *names: str, **fields: Any) -> Tensor:
    """PEFT's logits of the folder whose configuration lacks these entries, or has others."""
    described = json.loads((folder / CONFIG).read_text())
    kept = {key: value for key, value in described.items() if key not in names} | fields
    (folder / CONFIG).write_text(json.dumps(kept))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(tiny_model(), folder).eval())


LAYERS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
LEFT_OUT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "lora": (
        lambda: lora(r=8, lora_alpha=8),
        ("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "use_dora"),
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(**LAYERS, total_step=10),
        ("init_r", "target_r", "lora_alpha", "orth_reg_weight", "r", "rank_pattern"),
    ),
    "vera": (
        lambda: peft.VeraConfig(**LAYERS, r=8),
        ("d_initial", "projection_prng_key", "save_projection", "vera_dropout"),
    ),
    "miss": (lambda: peft.MissConfig(**LAYERS, r=5), ("miss_dropout", "mini_r", "init_weights", "bias")),
    "oft": (
        lambda: peft.OFTConfig(**LAYERS),
        ("r", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps", "module_dropout"),
    ),
    "ia3": (lambda: peft.IA3Config(task_type="CAUSAL_LM"), ("feedforward_modules", "target_modules")),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_an_entry_that_is_left_out_is_pefts_default(case: str, tmp_path: Path) -> None:
    make, names = LEFT_OUT[case]
    folder, expected = written(tmp_path / "peft", make())
    assert_near(without(folder, *names), expected)
    both_ways(folder, tmp_path / "own", expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"layers.9.q_proj": 2, "q_proj": 3}},
        {"alpha_pattern": {"nothing": 2}},
        {"rank_pattern": {"proj": 2}, "alpha_pattern": {r"layers\.7\..*": 1}},
    ],
    ids=str,
)
def test_a_pattern_that_names_no_layer_means_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "peft", lora())
    both_ways(folder, tmp_path / "own", without(folder, **fields))


@pytest.mark.parametrize("ending", ["head", "lm_head", "m_head", "norm", "layers.1.input_layernorm"])
def test_modules_to_save_are_found_by_any_end_of_their_names(ending: str, tmp_path: Path) -> None:
    folder, expected = written(tmp_path / "peft", lora(modules_to_save=[ending]), QWEN)
    both_ways(folder, tmp_path / "own", expected, QWEN)
    whole = any(key.startswith("base_model.model.lm_head.") for key in load_file(folder / WEIGHTS))
    assert whole == (ending in ("head", "lm_head", "m_head"))


def test_the_head_of_a_task_is_trained_in_full_whatever_the_configuration_says(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    config = lora(target_modules=["query"], task_type="SEQ_CLS")
    folder, expected = written(tmp_path / "peft", config, name)
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | {"modules_to_save": None}))
    both_ways(folder, tmp_path / "own", expected, name)


def head_beside(folder: Path, **changes: Any) -> Tensor:
    """An adapter on the output layer, beside which PEFT writes the base's own weight of it."""
    folder, expected = written(folder, lora(target_modules=["q_proj", "lm_head"]), **changes)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / WEIGHTS)
    return expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_of_the_bases_own_weight_is_no_part_of_the_adapter(tied: bool, tmp_path: Path) -> None:
    expected = head_beside(tmp_path / "peft", tie_word_embeddings=tied)
    both_ways(tmp_path / "peft", tmp_path / "own", expected, tie_word_embeddings=tied)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_copy_is_compared_with_a_base_in_fewer_bits(storage: str, tmp_path: Path) -> None:
    head_beside(tmp_path / "peft")
    base = saved_base(tmp_path / "base")
    dsub.import_peft(dsub.load_frozen(base, storage=storage), tmp_path / "peft")
    saved_base(tmp_path / "other", seed=1)
    with pytest.raises(
        UsageError, match=r"lm_head\.weight, which is not known here: it is no copy of this model's own"
    ):
        dsub.import_peft(dsub.load_frozen(tmp_path / "other", storage=storage), tmp_path / "peft")


def test_embeddings_that_peft_wrote_beside_to_be_safe_are_copies_too(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(QWEN), lora())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "peft" / WEIGHTS)
    expected = logits(peft.PeftModel.from_pretrained(tiny_model(QWEN), tmp_path / "peft").eval())
    both_ways(tmp_path / "peft", tmp_path / "own", expected, QWEN)


@pytest.mark.parametrize("how", ["trained", "resized"])
def test_a_weight_of_another_base_is_refused_on_both_ways(how: str, tmp_path: Path) -> None:
    head_beside(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors[key] = tensors[key] + 0.1 if how == "trained" else torch.cat([tensors[key], tensors[key][:4]])
    save_file(tensors, tmp_path / "peft" / WEIGHTS)
    refused_both_ways(
        tmp_path / "peft", tmp_path / "own", r"lm_head\.weight, which is not known here: it is no copy of this"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt"])
def test_a_value_that_is_no_number_is_said_as_such_on_every_way(kind: str, value: float, tmp_path: Path) -> None:
    config = {
        "lora": lambda: lora(modules_to_save=["norm"]),
        "dora": lambda: lora(use_dora=True),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]()
    folder, _ = written(tmp_path / "peft", config)
    own = dsub.save_adapter(trained(tiny_model(), kind), tmp_path / "saved")
    for place in (folder, own):
        tensors = load_file(place / WEIGHTS)
        key = sorted(tensors)[-1]
        tensors[key].view(-1)[-1] = value
        save_file(tensors, place / WEIGHTS)
    refused_both_ways(
        folder, tmp_path / "own", "holds values that are NaN or infinite, the first in .*: its training diverged"
    )
    for use in (
        lambda: dsub.load_adapter(tiny_model(), own),
        lambda: dsub.export_peft(own, tmp_path / "out", report=None),
    ):
        with pytest.raises(UsageError, match="holds values that are NaN or infinite"):
            use()


# Tied parameters: what is trained apart in PEFT is never put into one parameter, whichever way the adapter came.

TIED: dict[str, tuple[str, list[str], list[str]]] = {
    "llama, both": (LLAMA, LINEAR[LLAMA], ["embed_tokens", "lm_head"]),
    "llama, the head": (LLAMA, LINEAR[LLAMA], ["lm_head"]),
    "llama, the embedding": (LLAMA, LINEAR[LLAMA], ["embed_tokens"]),
    "gpt2, both": ("GPT2LMHeadModel", ["c_attn"], ["wte", "lm_head"]),
    "t5, the shared": ("T5ForConditionalGeneration", ["q", "v"], ["shared", "lm_head"]),
    "bert, the head": ("BertForMaskedLM", ["query"], ["decoder"]),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_modules_that_peft_trained_apart_are_refused_on_every_way(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, targets, saved = TIED[case]
    config = lora(target_modules=targets, modules_to_save=saved, task_type=None, fan_in_fan_out=name.startswith("GPT2"))
    folder, _ = written(tmp_path / "peft", config, name)
    message = (
        r"trained apart from .*, to which this model ties it; accepted: a base model with tie_word_embeddings: false"
    )
    refused_both_ways(folder, tmp_path / "own", message, name)
    if name == LLAMA:
        base = saved_base(tmp_path / "base")
        for command in (
            ["merge", str(tmp_path / "own"), str(tmp_path / "out"), "--base-model", str(base), "--storage", "fp32"],
            ["import", str(folder), str(tmp_path / "out"), "--base-model", str(base)],
        ):
            assert main(command) == 2
            assert "trained apart from" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]], ids=str)
def test_on_a_base_that_does_not_tie_them_they_are_read_and_merged(saved: list[str], tmp_path: Path) -> None:
    folder, expected = written(tmp_path / "peft", lora(modules_to_save=saved), tie_word_embeddings=False)
    both_ways(folder, tmp_path / "own", expected, tie_word_embeddings=False)
    base = saved_base(tmp_path / "base", tie_word_embeddings=False)
    model = dsub.load_adapter(frozen(base), tmp_path / "own")
    dsub.merge(model, tmp_path / "merged", report=None)
    assert_near(logits(type(tiny_model()).from_pretrained(tmp_path / "merged").eval()), expected)


@pytest.mark.parametrize(
    "name", [LLAMA, "GPT2LMHeadModel", "OPTForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"]
)
def test_our_own_tied_modules_stay_tied_for_peft_and_for_us(name: str, tmp_path: Path) -> None:
    """Both names are in the file, with one value; a module around one of them (BERT's) is not trained with it."""
    head = {"BertForMaskedLM": "decoder"}.get(name, "lm_head")
    layers = {"GPT2LMHeadModel": ["c_attn"], "BertForMaskedLM": ["query"], "T5ForConditionalGeneration": ["q"]}
    model = trained(tiny_model(name), target_modules=layers.get(name, ["q_proj"]), modules_to_save=[head])
    dsub.save_adapter(model, tmp_path)
    assert_near(logits(dsub.load_adapter(tiny_model(name), tmp_path)), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert_near(logits(theirs), logits(model))


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_a_model_without_biases_has_none_to_train(which: str, tmp_path: Path) -> None:
    folder, expected = written(tmp_path / "peft", lora(bias=which))
    both_ways(folder, tmp_path / "own", expected)
    folder, _ = written(tmp_path / "qwen", lora(bias=which), QWEN)
    refused_both_ways(folder, tmp_path / "none", f"bias is '{which}', and trained biases are not read", QWEN)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=str)
def test_tied_modules_that_peft_trained_as_one_stay_one(saved: list[str], tmp_path: Path) -> None:
    folder, expected = written(tmp_path / "peft", lora(modules_to_save=saved, ensure_weight_tying=True))
    both_ways(folder, tmp_path / "own", expected)
    model = dsub.import_peft(tiny_model(), folder)
    dsub.export_peft(model, tmp_path / "back")
    assert_near(logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "back").eval()), expected)


def test_a_start_that_peft_draws_at_random_is_refused_since_peft_itself_reads_another_model(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "peft", lora(init_lora_weights="pissa_niter_4"))
    read = []
    for seed in (1, 2):
        base = tiny_model()
        torch.manual_seed(seed)
        read.append(logits(peft.PeftModel.from_pretrained(base, folder).eval()))
    assert (read[0] - read[1]).abs().max() > 0.01 * read[0].abs().max()
    refused_both_ways(
        folder, tmp_path / "own", "is 'pissa_niter_4', a start that PEFT draws at random and does not save"
    )
