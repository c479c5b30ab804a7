"""Adapters as folders: exact when read back, and the same function in PEFT."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.api import load_adapted
from dist_subspace.atomic_files import StorageError
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import write_adapter
from dist_subspace.interchange.adapter_folder import read_adapter
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS, read_description
from dist_subspace.storage import FrozenLinear, storages
from dist_subspace.subspace import attached, file_options_of, frozen_in_file, named_trainables
from dist_subspace.subspace.core.registry import method_class
from tests.sampled import pairs
from tests.tiny_models import FAMILIES, logits, tiny_model

ABSOLUTE = {"dora": 1e-5, "sam-parser": 1e-5}
each_method = pytest.mark.parametrize("method", sorted(dsub.methods()))


def trained(model: Any, method: str = "lora", **config: Any) -> Any:
    """The model with a method on it, as a file holds it, and its trained values moved away from the start."""
    rank = 3 if dsub.methods()[method].uses_rank else None
    config = {"options": file_options_of(method_class(method), {}), **config}
    dsub.attach(model, SubspaceConfig(method=method, **{"rank": rank, "alpha": 5.0 if rank else None, **config}))
    generator = torch.Generator().manual_seed(1)
    for parameter in dsub.trainable_parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("name", "method"), pairs(FAMILIES, sorted(dsub.methods())))
def test_a_saved_adapter_read_back_is_the_same_adapter(method: str, name: str, tmp_path: Path) -> None:
    head = "classifier" if "Classification" in name else "lm_head" if name != "BertForMaskedLM" else "decoder"
    model = trained(tiny_model(name), method, modules_to_save=[head], seed=3)
    dsub.save_adapter(model, tmp_path / "adapter")
    again = dsub.load_adapter(tiny_model(name), tmp_path / "adapter")
    assert attached(again).layers == attached(model).layers
    assert attached(again).resolved.settings == attached(model).resolved.settings
    expected = named_trainables(model)
    assert named_trainables(again).keys() == expected.keys()
    for key, value in named_trainables(again).items():
        # Files hold absolute values (norms of rows, singular values), models deviations from them: large ones round more.
        torch.testing.assert_close(value, expected[key], rtol=0, atol=ABSOLUTE.get(method, 1e-7), msg=key)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-4)
    dsub.save_adapter(again, tmp_path / "again")
    first, second = load_file(tmp_path / "adapter" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-6 if method in ABSOLUTE else 0, atol=0, msg=key)


FROZEN = ("dash_U", "dash_V", "active")  # which a schedule has chosen: not trained, and not to be had from the base


@each_method
def test_an_adapters_file_is_four_bytes_a_trained_value_and_what_it_must_keep(method: str, tmp_path: Path) -> None:
    for storage in ("fp32", "nf4"):
        tiny_model().save_pretrained(tmp_path / "base")
        model = trained(dsub.load_frozen(tmp_path / "base", storage=storage), method)
        dsub.save_adapter(model, tmp_path / storage)
        beside = {key for m in model.modules() for key in frozen_in_file(m)}
        held = load_file(tmp_path / storage / WEIGHTS)
        own = {key: t for key, t in held.items() if ".factor." not in key and not key.endswith((*beside, *FROZEN))}
        assert {t.dtype for t in own.values()} == {torch.float32}
        assert sum(t.numel() for t in own.values()) == sum(p.numel() for p in dsub.trainable_parameters(model))
        size = (tmp_path / storage / WEIGHTS).stat().st_size
        everything = sum(t.numel() * t.element_size() for t in held.values())
        assert everything <= size <= everything + 200 * len(held)
        assert sorted(p.name for p in (tmp_path / storage).iterdir()) == [CONFIG, WEIGHTS, OWN_CONFIG]


def test_empty_tensors_are_never_saved(tmp_path: Path) -> None:
    """What a rank holds of a split parameter that nobody gathered is a tensor of no elements."""
    model = trained(tiny_model())
    model.model.layers[0].self_attn.q_proj.lora_A.data = torch.empty(0)
    with pytest.raises(
        RuntimeError, match=r"has no whole .*q_proj\.lora_A\.weight to save; every rank must call save_adapter"
    ):
        dsub.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# PEFT reads our LoRA and computes the same.


def in_peft(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = trained(tiny_model(name))
    dsub.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(in_peft(tiny_model(name), tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("storage", sorted(storages()))
def test_peft_computes_the_same_logits_on_the_weights_of_every_storage(name: str, storage: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "base")
    model = dsub.load_frozen(tmp_path / "base", storage=storage, double_quant=True)
    dtype = model.get_input_embeddings().weight.dtype
    plain = getattr(transformers, name).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    for module_name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            turned = type(plain.get_submodule(module_name)).__name__ == "Conv1D"
            plain.get_submodule(module_name).weight.data = module.dense(dtype).t() if turned else module.dense(dtype)
    dsub.save_adapter(trained(model), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["fan_in_fan_out"] == (name == "GPT2LMHeadModel")
    expected = logits(in_peft(plain, tmp_path / "adapter")).float()
    rounding = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert (logits(model).float() - expected).abs().max() <= rounding * expected.abs().max()


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
def test_peft_computes_the_same_logits_on_a_model_that_bitsandbytes_quantised(quantised: str, tmp_path: Path) -> None:
    # bitsandbytes' own CPU kernel is wrong on rows that are no multiple of its blocks of 64.
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    arguments: dict[str, Any] = {"load_in_8bit": True}
    if quantised == "nf4":
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    settings = transformers.BitsAndBytesConfig(**arguments)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model = dsub.load_frozen(tmp_path / "base", storage=quantised, dtype="float32")
    dsub.save_adapter(trained(model), tmp_path / "adapter")
    theirs = in_peft(plain, tmp_path / "adapter").train()  # evaluation takes inference kernels that round more
    tolerance = {"nf4": 1e-4, "int8": 1e-2}[quantised]
    expected = logits(theirs)
    assert (logits(model) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("BertForSequenceClassification", "classifier"),
        ("RobertaForSequenceClassification", "classifier"),
        ("Qwen2ForCausalLM", "lm_head"),
        ("Qwen2ForCausalLM", "embed_tokens"),
    ],
)
def test_peft_reads_the_modules_that_were_trained_in_full(name: str, module: str, tmp_path: Path) -> None:
    model = trained(tiny_model(name), modules_to_save=[module])
    dsub.save_adapter(model, tmp_path)
    theirs = in_peft(tiny_model(name), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_peft_reads_ranks_and_alphas_of_single_layers(method: str, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 9.0},
    }
    model = trained(tiny_model(), method, **patterns)
    dsub.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(in_peft(tiny_model(), tmp_path)), logits(model), rtol=1e-4, atol=1e-4)
    again = dsub.load_adapter(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "trilora"])
def test_an_adapter_whose_every_layer_a_pattern_names_is_read_back(method: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9.0}}
    model = trained(tiny_model(), method, rank=4, target_modules=["q_proj", "v_proj"], **patterns)
    dsub.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(dsub.load_adapter(tiny_model(), tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "trilora", "milora", "adalora"])
def test_an_alpha_that_follows_each_layers_rank_still_does_when_it_is_read_back(method: str, tmp_path: Path) -> None:
    model = trained(tiny_model(), method, rank=4, alpha=None, rank_pattern={"q_proj": 2})
    dsub.save_adapter(model, tmp_path / "own")
    again = dsub.load_adapter(tiny_model(), tmp_path / "own")
    layer = "model.layers.0.self_attn.q_proj"
    assert again.get_submodule(layer).settings.alpha == model.get_submodule(layer).settings.alpha
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    dsub.save_adapter(again, tmp_path / "again")
    assert (tmp_path / "own" / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()
    dsub.export_peft(tmp_path / "own", tmp_path / "peft", report=None)  # from the files alone
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "pissa", "svdiff", "spectral-rotational", "ssl"])
@pytest.mark.parametrize("side", ["hidden_size", "intermediate_size"])
def test_an_adapter_for_another_base_is_refused_before_the_model_is_touched(
    method: str, side: str, tmp_path: Path
) -> None:
    dsub.save_adapter(trained(tiny_model(), method), tmp_path)
    other = tiny_model(**{side: 64})
    before = dict(other.named_modules())
    with pytest.raises(UsageError, match=r"the adapter is for a .* it belongs to another base model"):
        dsub.load_adapter(other, tmp_path)
    assert dict(other.named_modules()) == before


@pytest.mark.parametrize("module", ["h.1.attn.c_proj", "h.1.mlp.c_fc"])
def test_a_conv1d_trained_in_full_lies_in_the_file_as_peft_reads_it(module: str, tmp_path: Path) -> None:
    model = trained(tiny_model("GPT2LMHeadModel"), target_modules=["attn.c_attn"], modules_to_save=[module])
    dsub.save_adapter(model, tmp_path / "own")
    theirs = in_peft(tiny_model("GPT2LMHeadModel"), tmp_path / "own")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    again = dsub.load_adapter(tiny_model("GPT2LMHeadModel"), tmp_path / "own")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "peft")
    imported = dsub.import_peft(tiny_model("GPT2LMHeadModel"), tmp_path / "peft")
    torch.testing.assert_close(logits(imported), logits(model), rtol=1e-4, atol=1e-4)


def test_labels_and_padding_of_a_classifier_come_back_with_it(tmp_path: Path) -> None:
    labels = {0: "no", 1: "yes"}
    told = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}, "pad_token_id": 2}
    tiny_model("LlamaForSequenceClassification", config_name="LlamaConfig").save_pretrained(tmp_path / "base")
    model = dsub.load_frozen(tmp_path / "base", storage="fp32", task="classification", num_labels=2, **told)
    dsub.save_adapter(trained(model), tmp_path / "adapter")
    again = load_adapted(tmp_path / "adapter")
    assert {name: getattr(again.config, name) for name in told} == told


def test_a_hub_models_adapter_names_the_hub_and_not_this_machines_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("0" * 40)
    tiny_model().save_pretrained(snapshot)
    (snapshot / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hub" / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--acme--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = trained(dsub.load_frozen("acme/tiny", storage="fp32"))
    dsub.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == "acme/tiny"
    again = load_adapted(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model))
    dsub.merge(again, tmp_path / "merged", report=None)
    assert (tmp_path / "merged" / "tokenizer_config.json").exists()


def test_a_rank_that_was_cut_to_the_model_is_the_rank_that_is_saved(tmp_path: Path) -> None:
    model = dsub.attach(tiny_model(), SubspaceConfig(method="vera"))
    dsub.save_adapter(model, tmp_path)
    described = read_description(tmp_path)
    assert described["dist_subspace"]["rank"] == described["r"] == 16
    again = dsub.load_adapter(tiny_model(), tmp_path)
    assert again.model.layers[0].self_attn.q_proj.settings.rank == 16


def test_the_configuration_says_how_the_base_was_held(tmp_path: Path) -> None:
    tiny_model("GPT2LMHeadModel").save_pretrained(tmp_path / "base")
    model = dsub.load_frozen(tmp_path / "base", storage="nf4", double_quant=True)
    dsub.save_adapter(dsub.attach(model, SubspaceConfig(method="ssl")), tmp_path / "adapter")
    ours = json.loads((tmp_path / "adapter" / OWN_CONFIG).read_text())
    held = {"storage": "nf4", "double_quant": True, "dtype": "bfloat16", "task": "causal-lm"}
    assert ours["base"] == held and ours["conv1d"] is True
    assert ours["shapes"]["transformer.h.0.mlp.c_fc"] == [128, 32] and "transformer.h.0.mlp.c_fc" in ours["biased"]


def test_peft_gets_the_same_layers_where_endings_would_mean_others(tmp_path: Path) -> None:
    model = trained(tiny_model(), target_modules=[r"layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
    dsub.save_adapter(model, tmp_path)
    theirs = in_peft(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    wrapped = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == 2


def test_the_configuration_says_what_the_adapter_is(tmp_path: Path) -> None:
    model = trained(tiny_model("GPT2LMHeadModel"), dropout=0.1)
    dsub.save_adapter(model, tmp_path, base_model="org/base")
    described = read_description(tmp_path)
    assert described["peft_type"] == "LORA" and described["task_type"] == "CAUSAL_LM"
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (3, 5.0, 0.1)
    assert described["fan_in_fan_out"] is True and described["base_model_name_or_path"] == "org/base"
    assert described["dist_subspace"]["format"] == 1 and len(described["dist_subspace"]["layers"]) == 8


# Bad folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dsub.save_adapter(trained(tiny_model()), tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **changes: Any) -> None:
    ours = json.loads((folder / OWN_CONFIG).read_text())
    (folder / OWN_CONFIG).write_text(json.dumps(ours | changes))


@pytest.mark.parametrize("missing", [None, CONFIG, WEIGHTS])
def test_a_folder_without_an_adapter_is_said(missing: str | None, folder: Path) -> None:
    if missing is None:
        shutil.rmtree(folder)
    else:
        (folder / missing).unlink()
    with pytest.raises(UsageError, match=f"holds no adapter; looked for {CONFIG} and {WEIGHTS}"):
        dsub.load_adapter(tiny_model(), folder)


def test_an_adapter_of_peft_itself_is_said(tmp_path: Path) -> None:
    peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"was not written by dist_subspace \(peft_type 'LORA'\)"):
        dsub.load_adapter(tiny_model(), tmp_path)


def test_a_configuration_that_is_not_json_is_said(folder: Path) -> None:
    for text, message in (("{\n,}", "is not JSON at line 2"), ("[]", "was not written by dist_subspace")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(UsageError, match=message):
            dsub.load_adapter(tiny_model(), folder)


def test_an_adapter_of_another_format_or_an_unknown_method_is_said(folder: Path) -> None:
    change(folder, format=99)
    with pytest.raises(UsageError, match=r"is of format 99; this version reads format 1"):
        dsub.load_adapter(tiny_model(), folder)
    change(folder, format=1, method="lorax")
    with pytest.raises(UsageError, match=r"subspace\.method is 'lorax' \(did you mean 'lora'\?\)"):
        dsub.load_adapter(tiny_model(), folder)


def test_a_truncated_file_is_said(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(UsageError, match=r"is no whole safetensors file .*; copy it again"):
        dsub.load_adapter(tiny_model(), folder)


def test_an_adapter_of_another_number_of_layers_is_said(folder: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the adapter lacks .*layers\.2\..*; it belongs to another base model or method"
    ):
        dsub.load_adapter(tiny_model(num_hidden_layers=3), folder)
    with pytest.raises(UsageError, match=r"the adapter is for .*layers\.1\..*, which is no linear layer of this model"):
        dsub.load_adapter(tiny_model(num_hidden_layers=1), folder)


def test_a_tensor_that_is_missing_or_too_many_is_said(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({key: t for key, t in tensors.items() if key != name}, folder / WEIGHTS)
    with pytest.raises(UsageError, match=f"the adapter lacks {name}"):
        dsub.load_adapter(tiny_model(), folder)
    save_file(tensors | {"more": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(UsageError, match="the adapter holds more, which this model has no layer for"):
        dsub.load_adapter(tiny_model(), folder)


def test_a_model_with_an_adapter_takes_no_second(folder: Path) -> None:
    with pytest.raises(UsageError, match="has a subspace method already"):
        dsub.load_adapter(trained(tiny_model()), folder)


def test_a_model_without_a_method_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has no subspace method; call attach first"):
        dsub.save_adapter(tiny_model(), tmp_path)


def test_read_adapter_gives_the_configuration_and_the_tensors(folder: Path) -> None:
    adapter = read_adapter(folder)
    config, tensors = adapter.config, adapter.tensors
    assert config.method == "lora" and config.rank == 3 and len(tensors) == 28
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_saving_over_an_adapter_leaves_a_whole_one(folder: Path) -> None:
    model = trained(tiny_model(), "ssl")
    dsub.save_adapter(model, folder)
    torch.testing.assert_close(logits(dsub.load_adapter(tiny_model(), folder)), logits(model))
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def held_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """The kernel refuses bytes beyond a limit a file, as a full disk would, to Python and to safetensors' own writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("refused", [WEIGHTS, OWN_CONFIG])
def test_a_disk_that_refuses_is_one_sentence_and_what_was_there_stays(
    refused: str, folder: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    """A limit below the weights, or, with little in them, below the configuration alone."""
    little = {"method": "ssl", "target_modules": ["layers.0.self_attn.k_proj"]}
    model = trained(tiny_model(), **({} if refused == WEIGHTS else little))
    dsub.save_adapter(model, tmp_path / "room")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "room").iterdir()}
    other = min(size for name, size in sizes.items() if name != refused)
    assert other < sizes[refused], "the limit would refuse the other file"
    before = held_bytes(folder)
    small_files(sizes[refused] - 1)
    for target in (folder, tmp_path / "made" / "new"):
        with pytest.raises(
            StorageError, match=rf"{target.name} could not be written \(.*File too large.*; .* MiB free\)"
        ):
            dsub.save_adapter(model, target)
    assert held_bytes(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "room"]


def test_an_error_before_the_renames_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    tensors = read_adapter(folder).tensors
    before = held_bytes(folder)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(TypeError, match="not JSON serializable"):
            write_adapter(target, {key: tensor + 1 for key, tensor in tensors.items()}, {"not": object()})
    assert held_bytes(folder) == before and [path.name for path in tmp_path.iterdir()] == ["adapter"]
