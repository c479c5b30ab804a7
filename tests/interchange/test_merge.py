"""A merged model is the adapter's model as a plain checkpoint: the same logits from transformers' own loading."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.merge import MergeReport
from dist_subspace.loading.original import original_of
from dist_subspace.storage import FrozenLinear
from tests.interchange.trained import frozen, in_process, saved_base, trained
from tests.tiny_models import FAMILIES, VOCABULARY, logits, tiny_model
from tests.tiny_run import make_model

MERGEABLE = sorted(name for name, info in dsub.methods().items() if info.mergeable)
OTHERS = sorted(name for name, info in dsub.methods().items() if not info.mergeable)


def reloaded(folder: Path, name: str = "LlamaForCausalLM") -> Any:
    """What transformers makes of the folder, in float32; a tensor that it misses or does not know fails the test."""
    model, told = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def quiet(model: Any, folder: Path, *args: Any, **kwargs: Any) -> MergeReport:
    return dsub.merge(model, folder, *args, report=None, **kwargs)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_transformers_computes_the_adapters_logits_from_the_merged_checkpoint(
    method: str, name: str, storage: str, tmp_path: Path
) -> None:
    model = trained(frozen(saved_base(tmp_path / "base", name), name, storage), method)
    report = quiet(model, tmp_path / "merged")
    with dsub.disabled(model):
        assert not torch.allclose(logits(model), logits(reloaded(tmp_path / "merged", name)), atol=1e-3)
    assert_near(logits(reloaded(tmp_path / "merged", name)), logits(model))
    assert (report.total_drift is None) == (storage == "fp32")
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("base", "merged")] == []


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_every_family_is_written_under_the_keys_that_transformers_writes(
    name: str, storage: str, tmp_path: Path
) -> None:
    """With its output layer trained in full beside the adapter, tied or not."""
    head = {"BertForMaskedLM": "decoder"}.get(name, "classifier" if "Classification" in name else "lm_head")
    base = saved_base(tmp_path / "base", name)
    model = trained(frozen(base, name, storage), modules_to_save=[head])
    quiet(model, tmp_path / "merged", max_shard_bytes=20_000)
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    keys = {key for file in files for key in load_file(file)}
    untied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} if name == "BertForMaskedLM" else set()
    assert len(files) > 1 and keys - untied == set(load_file(base / "model.safetensors"))
    assert_near(logits(reloaded(tmp_path / "merged", name)), logits(model))


def test_a_model_that_transformers_loaded_is_merged_too(tmp_path: Path) -> None:
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        model = trained(tiny_model(name))
        report = quiet(model, tmp_path / name)
        assert report.total_drift is None and "no layer is quantised" in str(report)
        assert_near(logits(reloaded(tmp_path / name, name)), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_the_weights_are_written_in_the_type_that_is_asked_for(dtype: str | None, tmp_path: Path) -> None:
    model = trained(frozen(saved_base(tmp_path / "base"), storage="nf4", dtype="bfloat16"))
    report = quiet(model, tmp_path / "merged", dtype=dtype)
    expected = dtype or "bfloat16"
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(t.dtype) for t in written.values()} == {f"torch.{expected}"} and report.dtype == expected
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == expected
    assert report.bytes == sum(t.numel() * t.element_size() for t in written.values())


def test_files_of_a_bounded_size_have_an_index(tmp_path: Path) -> None:
    model = trained(frozen(saved_base(tmp_path / "base")))
    most = 12_000
    report = quiet(model, tmp_path / "merged", max_shard_bytes=most)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert report.files == len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file.name: load_file(file) for file in files}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= most
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    assert index["metadata"]["total_size"] == report.bytes


def test_the_tokenizer_and_the_generation_settings_go_with_it(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"sp")
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 2}))
    model = trained(frozen(base))
    quiet(model, tmp_path / "own")
    quiet(model, tmp_path / "given", tokenizer=tmp_path / "other")
    assert (tmp_path / "own" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "given" / "tokenizer.model").read_bytes() == b"sp"
    assert not (tmp_path / "given" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "own" / "generation_config.json").read_text())["max_new_tokens"] == 3
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in (tmp_path / "own").iterdir())


# The two bases (docs/failures.md, "A merged model forgets").


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_both_bases_are_offered_and_their_distance_is_measured_and_printed(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged model "forgets" where the adapter was trained beside Ŵ and is merged into another W: both are a choice,
    and what lies between them is said."""
    base = saved_base(tmp_path / "base")
    model = trained(frozen(base, storage=storage), "lora")
    on_held = dsub.merge(model, tmp_path / "dequantised")
    on_original = dsub.merge(model, tmp_path / "original", base="original")
    assert_near(logits(reloaded(tmp_path / "dequantised")), logits(model))
    dsub.save_adapter(model, tmp_path / "adapter")
    same_on_original = dsub.load_adapter(frozen(base), tmp_path / "adapter")
    assert_near(logits(reloaded(tmp_path / "original")), logits(same_on_original))
    assert not torch.allclose(logits(reloaded(tmp_path / "original")), logits(model), atol=1e-3)
    layers = {
        n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, FrozenLinear) and not m.is_float
    }
    expected = {n: (m.dense() - original_of(m)).norm() / original_of(m).norm() for n, m in layers.items()}
    for report in (on_held, on_original):
        assert report.drift.keys() == expected.keys() and len(expected) == 14
        for layer, value in expected.items():
            assert report.drift[layer] == pytest.approx(float(value), rel=1e-4)
    worst = max(expected, key=lambda n: float(expected[n]))
    distance = torch.stack([(m.dense() - original_of(m)).norm() for m in layers.values()]).norm()
    total = float(distance / torch.stack([original_of(m).norm() for m in layers.values()]).norm())
    printed = capsys.readouterr().out
    said = f"|dequantised - original| / |original|: {total:.3e} over 14 layers, at most {float(expected[worst]):.3e} ({worst})"
    assert printed.count(said) == 2 and "merged into the original base" in printed


def test_what_has_no_original_has_an_unknown_drift_and_no_merge_onto_it(tmp_path: Path) -> None:
    saved_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = trained(load(tmp_path / "base", quantization_config=settings, dtype=torch.float32, device_map="cpu"))
    report = quiet(model, tmp_path / "merged")
    assert "unknown, the originals of 14 layers are not to be had" in str(report)
    assert_near(logits(reloaded(tmp_path / "merged")), logits(model))
    with pytest.raises(
        UsageError,
        match=r"base is 'original', but model\.layers\.0\..*q_proj was not read .*; accepted here: dequantised",
    ):
        quiet(model, tmp_path / "other", base="original")


@pytest.mark.parametrize("method", sorted({"pissa", "milora", "olora"} & set(MERGEABLE)))
def test_a_folded_residual_is_merged_onto_either_base(method: str, tmp_path: Path) -> None:
    """The base holds Q(W - γ B0 A0): onto it B A is added, onto the original B A - B0 A0."""
    base = saved_base(tmp_path / "base")
    model = trained(frozen(base, storage="nf4"), method, options={"residual": "fold"})
    report = quiet(model, tmp_path / "dequantised")
    assert_near(logits(reloaded(tmp_path / "dequantised")), logits(model))
    quiet(model, tmp_path / "original", base="original")
    dense = trained(frozen(base), method, options={"residual": "stacked"})
    for (name, p), (_, own) in zip(_trained(dense), _trained(model), strict=True):
        p.data.copy_(own), name
    rest = logits(reloaded(tmp_path / "original")) - logits(model)
    assert 0 < report.total_drift < 0.2 and rest.abs().max() > 1e-4
    assert rest.norm() < 0.3 * logits(model).norm()


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


# What the plain architecture must be told.


def test_an_output_layer_that_was_changed_without_its_embedding_is_no_longer_tied(tmp_path: Path) -> None:
    model = trained(frozen(saved_base(tmp_path / "base")), target_modules=["lm_head", "q_proj"])
    assert model.config.tie_word_embeddings
    quiet(model, tmp_path / "merged")
    again = reloaded(tmp_path / "merged")
    assert not again.config.tie_word_embeddings and again.lm_head.weight is not again.model.embed_tokens.weight
    assert model.config.tie_word_embeddings, "the model's own configuration was changed"
    assert_near(logits(again), logits(model))


needs_bitfit = pytest.mark.skipif("bitfit" not in dsub.methods(), reason="bitfit is not registered")


@needs_bitfit
def test_biases_that_the_method_brought_are_given_a_place(tmp_path: Path) -> None:
    """LLaMA has none until its configuration says so; layers that got none have zeros then."""
    for number, targets in enumerate((None, ["q_proj", "up_proj"])):
        model = trained(frozen(saved_base(tmp_path / f"base{number}")), "bitfit", target_modules=targets)
        quiet(model, tmp_path / f"merged{number}")
        again = reloaded(tmp_path / f"merged{number}")
        assert again.config.attention_bias and again.config.mlp_bias
        assert_near(logits(again), logits(model))


@needs_bitfit
def test_biases_that_the_architecture_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model = trained(
        frozen(saved_base(tmp_path / "base", "T5ForConditionalGeneration"), "T5ForConditionalGeneration"), "bitfit"
    )
    with pytest.raises(UsageError, match=r"method bitfit added a bias to encoder\..* where T5.* has no place for one"):
        quiet(model, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@needs_bitfit
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification", "OPTForCausalLM"])
def test_biases_of_linear_layers_and_norms_are_merged(name: str, tmp_path: Path) -> None:
    model = trained(frozen(saved_base(tmp_path / "base", name), name, "nf4"), "bitfit")
    quiet(model, tmp_path / "merged")
    assert_near(logits(reloaded(tmp_path / "merged", name)), logits(model))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize(
    ("name", "tied"),
    [("LlamaForCausalLM", True), ("LlamaForCausalLM", False), ("GPT2LMHeadModel", True), ("BertForMaskedLM", True)],
)
def test_new_tokens_are_rows_of_larger_tables(name: str, tied: bool, storage: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", name, tie_word_embeddings=tied)
    model = trained(frozen(base, name, storage), new_tokens=[VOCABULARY, VOCABULARY + 1])
    quiet(model, tmp_path / "merged")
    again = reloaded(tmp_path / "merged", name)
    assert again.config.vocab_size == again.get_input_embeddings().num_embeddings == VOCABULARY + 2
    assert again.config.tie_word_embeddings == tied
    ids = torch.tensor([[3, VOCABULARY, 4, VOCABULARY + 1, 5]])
    changes = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert logits(again, **changes).shape[-1] == VOCABULARY + 2
    assert_near(logits(again, **changes), logits(model, **changes))


# Refusals: one sentence, and nothing on the disk.


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_that_does_not_merge_is_refused_by_name(method: str, tmp_path: Path) -> None:
    model = trained(tiny_model(), method)
    with pytest.raises(UsageError, match=f"method {method} cannot be merged: .*; accepted for it: save_adapter"):
        quiet(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_activation_between_the_factors_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = trained(tiny_model(), "lora", constraint="mpc_n")
    with pytest.raises(
        UsageError, match=r"method lora with constraint mpc_n cannot be merged: .*the update is no matrix"
    ):
        quiet(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has no subspace method"):
        quiet(tiny_model(), tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "orignal"}, r"base is 'orignal' \(did you mean 'original'\?\); accepted: dequantised, original"),
        ({"dtype": "float8"}, r"dtype is 'float8'.*; accepted: float32, bfloat16, float16"),
    ],
)
def test_an_argument_that_is_not_accepted_is_said(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quiet(trained(tiny_model()), tmp_path / "merged", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_never_written_into(tmp_path: Path) -> None:
    model = trained(tiny_model())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(
            UsageError, match=rf"OUT is '.*{name}', which holds something already; accepted: a new or an"
        ):
            quiet(model, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    quiet(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_value_that_the_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = trained(tiny_model())
    model.model.layers[1].mlp.up_proj.lora_B.data.fill_(3e5)
    with pytest.raises(
        UsageError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that float16 cannot hold; accepted: a wider",
    ):
        quiet(model, tmp_path / "merged", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, in a process of its own."""
    found = in_process(
        f"""
        import resource
        model = trained(tiny_model())
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            dsub.merge(model, {str(tmp_path / "merged")!r})
        except OSError as error:
            print(type(error).__name__, error)
        """
    )
    assert "StorageError" in found.stdout and "could not be written (File too large; " in found.stdout, found
    assert found.stdout.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_merge_that_is_killed_leaves_no_folder_of_the_name_and_the_next_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "merged"
    found = in_process(
        f"""
        import os, signal
        def stop(done, total):
            if done == total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        dsub.merge(trained(tiny_model()), {str(out)!r}, progress=stop)
        """
    )
    assert found.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".merged.partial"]
    quiet(trained(tiny_model()), out)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"] and reloaded(out)


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(trained(tiny_model()), tmp_path / "merged", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_a_few_copies_of_the_largest_matrix_and_not_the_model(tmp_path: Path) -> None:
    """A model whose largest matrix is 1/20 of it: the merge's peak above what was resident is at most 6 float32 copies of that
    matrix (and the converted piece that is being written)."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    found = in_process(
        f"""
        import re
        def resident(word):
            return int(re.search(word + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        changes = dict(vocab_size=512, num_key_value_heads=8, **{sizes!r})
        saved_base(Path({str(tmp_path / "base")!r}), **changes)
        model = trained(frozen(Path({str(tmp_path / "base")!r}), storage="nf4"), rank=8)
        dsub.merge(model, {str(tmp_path / "warm")!r}, report=None)
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = resident("VmRSS")
        report = dsub.merge(model, {str(tmp_path / "merged")!r}, report=None)
        print("ABOVE", resident("VmHWM") - before, "ALL", report.bytes)
        """
    )
    words = found.stdout.split()
    above, everything = int(words[1]), int(words[3])
    largest = 512 * 2048 * 4
    assert everything > 25 * largest
    assert above <= 6 * largest + 4 * 4 * 2**20, f"{above / largest:.1f} matrices"


def test_a_tokenizer_that_lacks_the_new_tokens_is_not_written_beside_them(tmp_path: Path, said: list[str]) -> None:
    make_model(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    number = tokenizer.convert_tokens_to_ids("<|new|>")
    model = trained(dsub.load_frozen(tmp_path / "base", "fp32"), new_tokens=[number])
    quiet(model, tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    assert said[-1].startswith("the merged model is written without a tokenizer")
    quiet(model, tmp_path / "with", tokenizer=tokenizer)
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "with")
    assert merged("<|new|>").input_ids[-1] == number
