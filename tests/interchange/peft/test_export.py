"""What is exported computes the same in PEFT (and, by its rules, in vLLM), from a model or a folder alone; or is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG, WEIGHTS, read_description
from dist_subspace.interchange.peft.export_report import ExportReport
from dist_subspace.storage import FrozenLinear
from tests.interchange import vllm_rules
from tests.interchange.peft.adapters import DIRECT, NOT_ON_CONV1D, model_with
from tests.interchange.trained import in_process, trained
from tests.tiny_models import logits, tiny_model

EXACT_LORA = (
    *("pissa", "milora", "olora", "trilora", "flexlora", "flora", "moslora"),
    *("spectral-additive", "spectral-rotational", "lora-dash", "lora-xs"),
)
SCALING = ("ssl",)
TOO_LARGE = ("svdiff", "sam-parser")  # full spectra; an exact LoRA with a small top_k
MERGE_INSTEAD = ("liera", "ssb", "bitfit")
OWN_FOLDER_ONLY = ("parallel-adapter", "houlsby", "pfeiffer")
FAMILIES = ["LlamaForCausalLM", "GPT2LMHeadModel"]


def here(*names: str) -> list[str]:
    return [name for name in names if name in dsub.methods()]


def test_the_table_names_every_method_once() -> None:
    table = [*DIRECT, *EXACT_LORA, *SCALING, *TOO_LARGE, *MERGE_INSTEAD, *OWN_FOLDER_ONLY]
    assert len(table) == len(set(table)) == 32 and set(dsub.methods()) <= set(table)


def export(source: Any, out: Path, *args: Any, **kwargs: Any) -> ExportReport:
    return dsub.export_peft(source, out, *args, report=None, **kwargs)


def in_peft(name: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(tiny_model(name), folder).eval()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def same_files(first: Path, second: Path) -> None:
    a, b = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=key)
    assert json.loads((first / CONFIG).read_text()) == json.loads((second / CONFIG).read_text())


@pytest.mark.parametrize("method", here(*DIRECT, *EXACT_LORA, *SCALING, *TOO_LARGE))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("error:Unexpected keyword arguments", "error:Found missing adapter keys")
def test_peft_computes_the_same_from_a_model_and_from_a_folder_alone(method: str, name: str, tmp_path: Path) -> None:
    model = model_with(method, name)
    if method == "oft" and name.startswith("GPT2"):  # no product of thin matrices either
        with pytest.raises(UsageError, match="method oft has no exact form in PEFT; accepted: merge, or approximate"):
            export(model, tmp_path / "from-model")
        return
    report = export(model, tmp_path / "from-model")
    direct = method in DIRECT and not (name.startswith("GPT2") and method in NOT_ON_CONV1D)
    expected = "direct" if direct else "scaling" if method in SCALING else "lora"
    kind = DIRECT[method] if direct else "IA3" if method == "ssl" else "LORA"
    assert report.form == expected and report.peft_type == kind
    ours = logits(model)
    theirs = logits(in_peft(name, tmp_path / "from-model"))[:, -ours.shape[1] :]  # PEFT keeps those of virtual tokens
    with dsub.disabled(model):
        assert not torch.allclose(theirs, logits(model), atol=1e-3), "nothing was exported"
    assert_near(theirs, ours)
    dsub.save_adapter(model, tmp_path / "own")
    assert export(tmp_path / "own", tmp_path / "from-folder").form == expected
    same_files(tmp_path / "from-model", tmp_path / "from-folder")
    assert sorted(p.name for p in (tmp_path / "from-model").iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["from-folder", "from-model", "own"]


@pytest.mark.parametrize(
    "method", here(*[m for m, t in DIRECT.items() if t == "LORA" and m != "dora"], *EXACT_LORA, *TOO_LARGE)
)
@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_reads_every_lora(method: str, name: str, tmp_path: Path) -> None:
    model = model_with(method, name)
    export(model, tmp_path / "out")
    assert_near(logits(vllm_rules.apply(tiny_model(name), tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", here("lora", "rslora", "trilora", "pissa"))
def test_layers_with_ranks_of_their_own_have_one_scale_for_vllm_and_patterns_for_peft(
    method: str, tmp_path: Path
) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 9.0},
    }
    model = model_with(method, **patterns)
    report = export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert report.form == "lora" and config["r"] == config["lora_alpha"] == report.rank
    assert (
        config["rank_pattern"] == config["alpha_pattern"] and config["rank_pattern"]["model.layers.0.self_attn.q_proj"]
    )
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "out")), logits(model))
    assert_near(logits(vllm_rules.apply(tiny_model(), tmp_path / "out")), logits(model))


def test_a_lora_whose_layers_differ_in_rank_alone_stays_its_own_file(tmp_path: Path) -> None:
    """γ is the same everywhere then, and vLLM needs no more."""
    model = model_with("lora", rank=4, alpha=8.0, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4.0})
    assert export(model, tmp_path / "out").form == "direct"
    assert_near(logits(vllm_rules.apply(tiny_model(), tmp_path / "out")), logits(model))
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", here("adalora", "flexlora"))
def test_triplets_that_were_taken_away_take_no_room_in_a_lora(method: str, tmp_path: Path) -> None:
    model = model_with(method)
    part = model.model.layers[0].self_attn.q_proj
    part.lora_E.data[1:] = 0
    report = export(model, tmp_path / "out", "lora")
    held = load_file(tmp_path / "out" / WEIGHTS)
    assert held["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (1, 32)
    assert report.rank == max(t.shape[0] for key, t in held.items() if "lora_A" in key) > 1
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "out")), logits(model))
    assert_near(logits(vllm_rules.apply(tiny_model(), tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", here("lora", "vera", "adalora", "miss"))
def test_a_method_of_pefts_own_is_an_exact_lora_too_when_that_is_asked_for(method: str, tmp_path: Path) -> None:
    model = model_with(method)
    report = export(model, tmp_path / "out", "lora")
    assert report.form == "lora" and report.peft_type == "LORA"
    assert_near(logits(vllm_rules.apply(tiny_model(), tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", here("ia3"))
def test_layers_that_scale_their_input_are_pefts_feedforward_modules(method: str, tmp_path: Path) -> None:
    for name, module in (("LlamaForCausalLM", "down_proj"), ("GPT2LMHeadModel", "mlp.c_proj")):
        targets = ["k_proj", "v_proj", "down_proj"] if name.startswith("Llama") else ["attn.c_attn", "mlp.c_proj"]
        model = model_with(method, name, target_modules=targets, options={"input_scaled_modules": [module]})
        export(model, tmp_path / name)
        assert_near(logits(in_peft(name, tmp_path / name)), logits(model))


@pytest.mark.parametrize("method", here("ssl", "lora", "pissa"))
def test_modules_that_were_trained_in_full_go_with_it_and_vllm_is_said_not_to_read_them(
    method: str, tmp_path: Path
) -> None:
    model = trained(tiny_model("Qwen2ForCausalLM"), method, modules_to_save=["lm_head"])
    report = export(model, tmp_path / "out")
    assert any("trained in full" in note for note in report.notes)
    assert_near(logits(in_peft("Qwen2ForCausalLM", tmp_path / "out")), logits(model))


def test_who_cannot_read_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in here("dora", "ssl"):
        dsub.export_peft(model_with(method), tmp_path / method)
    printed = capsys.readouterr().out
    assert "vLLM does not read DoRA" in printed and "vLLM reads LoRA alone: this folder (IA3) is for PEFT" in printed
    assert f"{tmp_path / 'ssl'}: ssl as PEFT's IA3 (exact scalings), " in printed


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("method", here("pissa", "flora", "ssl"))
def test_an_adapter_of_quantised_weights_is_exported_as_it_acts_on_them(
    method: str, storage: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = trained(dsub.load_frozen(tmp_path / "base", storage=storage, dtype="float32"), method)
    export(model, tmp_path / "out")
    plain = tiny_model()
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and not module.is_float:
            plain.get_submodule(name.removesuffix(".base")).weight.data = module.dense()
    assert_near(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()), logits(model), 2e-5)


def test_loftq_of_several_rounds_is_exported_for_a_base_that_peft_can_have(tmp_path: Path) -> None:
    """The model's own base is `Q(W - L)` then, which nobody else has: the file's pair is for W, as a merge onto W is."""
    tiny_model().save_pretrained(tmp_path / "base")
    options = {"init": "loftq", "iterations": 3}
    model = trained(dsub.load_frozen(tmp_path / "base", storage="nf4", dtype="float32"), "lora", options=options)
    dsub.save_adapter(model, tmp_path / "adapter")
    dsub.merge(model, tmp_path / "merged", base="original", dtype="float32", report=None)
    merged = type(tiny_model()).from_pretrained(tmp_path / "merged").eval()
    assert export(model, tmp_path / "live").form == export(tmp_path / "adapter", tmp_path / "files").form == "lora"
    same_files(tmp_path / "live", tmp_path / "files")
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "live")), logits(merged), 2e-5)


# Refusals, and approximations.


@pytest.mark.parametrize("method", here(*MERGE_INSTEAD))
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_method_without_an_exact_form_is_refused_with_merge_suggested(
    method: str, from_folder: bool, tmp_path: Path
) -> None:
    model = model_with(method)
    source: Any = dsub.save_adapter(model, tmp_path / "own") if from_folder else model
    with pytest.raises(
        UsageError,
        match=f"method {method} has no exact form in PEFT; accepted: merge, or approximate_rank for a low-rank",
    ):
        export(source, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name != "own"]


@pytest.mark.parametrize("method", here(*OWN_FOLDER_ONLY))
def test_a_method_that_is_no_change_of_weights_is_refused(method: str, tmp_path: Path) -> None:
    model = model_with(method)
    for source in (model, dsub.save_adapter(model, tmp_path / "own")):
        with pytest.raises(
            UsageError, match=f"method {method} has no exact form in PEFT; accepted: save_adapter, whose"
        ):
            export(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_an_activation_between_the_factors_is_never_told_to_peft_as_a_lora(tmp_path: Path) -> None:
    model = trained(tiny_model(), "lora", constraint="mpc_n")
    dsub.save_adapter(model, tmp_path / "own")
    assert read_description(tmp_path / "own")["peft_type"] is None
    for source in (model, tmp_path / "own"):
        with pytest.raises(UsageError, match="method lora with constraint mpc_n has no exact form in PEFT"):
            export(source, tmp_path / "out")


@pytest.mark.parametrize("method", here(*TOO_LARGE))
def test_a_full_spectrum_does_not_pay_as_a_lora_unless_it_is_asked_for(method: str, tmp_path: Path) -> None:
    model = model_with(method, options={"top_k": None})
    with pytest.raises(UsageError, match=f"method {method} is a LoRA only with more numbers than the weights that it changes; "
                       "accepted: form lora nevertheless, merge, or approximate_rank"):  # fmt: skip
        export(model, tmp_path / "out")
    report = export(model, tmp_path / "out", "lora")
    assert report.rank == 32
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "out")), logits(model))


def peak_of_an_export(arguments: str, folder: Path, from_folder: bool) -> tuple[str, int]:
    """What was said, and the bytes of the process's peak above what was resident: of a full spectrum of 36 MiB of weights."""
    found = in_process(
        f"""
        import re
        from dist_subspace.errors import UsageError
        def resident(word):
            return int(re.search(word + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=16, num_key_value_heads=4)
        source = trained(tiny_model(**sizes), "svdiff", options=dict(top_k=None))
        if {from_folder}:
            source = dsub.save_adapter(source, {str(folder / "own")!r})
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before, said = resident("VmRSS"), "written"
        try:
            dsub.export_peft(source, {str(folder / "out")!r}, report=None, {arguments})
        except UsageError as error:
            said = "refused" if "only with more numbers than" in str(error) else str(error)
        print(said, resident("VmHWM") - before)
        """
    )
    said, above = found.stdout.rsplit(maxsplit=1)
    return said, int(above)


@pytest.mark.skipif("svdiff" not in dsub.methods(), reason="svdiff is not registered")
@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize(("arguments", "said"), [("", "refused"), ("approximate_rank=2", "written")])
def test_a_full_spectrum_that_is_not_written_is_never_held(
    arguments: str, said: str, from_folder: bool, tmp_path: Path
) -> None:
    found, above = peak_of_an_export(arguments, tmp_path, from_folder)
    mapped = 2 * (tmp_path / "own" / WEIGHTS).stat().st_size if from_folder else 0  # pages of the file, opened twice
    assert found == said and above - mapped < 20 * 2**20, f"{above / 2**20:.0f} MiB, {mapped / 2**20:.0f} of the file"


@pytest.mark.parametrize("method", here("pissa"))
def test_a_layer_that_does_not_pay_alone_goes_with_those_that_do(method: str, tmp_path: Path) -> None:
    model = model_with(method, rank_pattern={"layers.0.self_attn.k_proj": 16})
    report = export(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / WEIGHTS)
    pair = [t.numel() for key, t in held.items() if "layers.0.self_attn.k_proj" in key]
    assert report.form == "lora" and sum(pair) > 32 * 16
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", here("ia3"))
def test_scalings_that_leave_a_bias_alone_are_not_pefts(method: str, tmp_path: Path) -> None:
    model = model_with(method, "GPT2LMHeadModel", options={"scale_bias": False})
    with pytest.raises(UsageError, match="method ia3 has no exact form in PEFT"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("method", here("ssb", "liera", "svdiff"))
def test_an_approximation_has_its_error_measured(method: str, tmp_path: Path) -> None:
    model = model_with(method, options={"top_k": None} if method == "svdiff" else {})
    errors = []
    for rank in (2, 8, 32):
        report = export(model, tmp_path / str(rank), approximate_rank=rank)
        assert report.form == "approximate" and report.rank <= rank
        config = json.loads((tmp_path / str(rank) / CONFIG).read_text())
        theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / str(rank)).merge_and_unload()
        lost = size = 0.0
        for name, part in [(n, m) for n, m in model.named_modules() if hasattr(m, "base")]:
            weight = part.base.dense()
            wanted = part.merged(weight).detach() - weight
            missing = wanted - (theirs.get_submodule(name).weight.detach() - weight)
            assert report.errors[name] == pytest.approx(float(missing.norm() / wanted.norm()), abs=1e-4)
            lost, size = lost + float(missing.norm()) ** 2, size + float(wanted.norm()) ** 2
        assert report.error == pytest.approx((lost / size) ** 0.5, abs=1e-4) and config["peft_type"] == "LORA"
        assert f"relative error of the updates: {report.error:.3e} over all layers" in str(report)
        errors.append(report.error)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    assert_near(logits(in_peft("LlamaForCausalLM", tmp_path / "32")), logits(model), 1e-4)


@pytest.mark.parametrize("method", here("ssb", "bitfit"))
def test_an_approximation_that_cannot_be_made_says_what_is_missing(method: str, tmp_path: Path) -> None:
    model = model_with(method)
    dsub.save_adapter(model, tmp_path / "own")
    with pytest.raises(
        UsageError, match="is told by its base alone; accepted: a model" if method == "ssb" else "bitfit"
    ):
        export(tmp_path / "own", tmp_path / "out", approximate_rank=4)
    if method == "bitfit":
        with pytest.raises(
            UsageError, match="method bitfit changes biases, which a LoRA does not hold; accepted: merge"
        ):
            export(model, tmp_path / "out", approximate_rank=4)
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "loar"}, r"form is 'loar' \(did you mean 'lora'\?\); accepted: auto, direct, lora, scaling"),
        ({"form": "scaling"}, r"form is 'scaling', which method lora does not have here; accepted: auto, or merge"),
        ({"approximate_rank": 0}, r"approximate_rank is 0; accepted: a whole number of at least 1"),
    ],
)
def test_an_argument_that_is_not_accepted_is_said(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export(model_with("lora"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_new_tokens_are_refused_with_merge_suggested(tmp_path: Path) -> None:
    model = trained(tiny_model(), new_tokens=[96])
    for source in (model, dsub.save_adapter(model, tmp_path / "own")):
        with pytest.raises(UsageError, match=r"the adapter has new tokens, which .*; accepted: merge"):
            export(source, tmp_path / "out")


def test_a_folder_without_an_adapter_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter; looked for"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="the model has no subspace method"):
        export(tiny_model(), tmp_path / "out")


def test_a_folder_that_holds_something_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="which holds something already"):
        export(model_with("lora"), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["notes.txt"] and os.listdir(tmp_path) == ["out"]


def test_the_card_of_an_export_says_how_peft_loads_it_and_how_we_read_it_back(tmp_path: Path) -> None:
    export(model_with("pissa" if "pissa" in dsub.methods() else "lora"), tmp_path / "out", "lora")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained(" in card and "dsub.import_peft(" in card and "load_adapter" not in card
