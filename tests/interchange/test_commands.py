"""merge, export and import on the command line: exit status, one sentence for what is refused, and what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.interchange.description import CONFIG
from tests.interchange.peft.adapters import lora, written
from tests.interchange.trained import frozen, saved_base, trained
from tests.ranks import ROOT
from tests.tiny_models import logits, tiny_model


def adapter(tmp_path: Path, method: str = "lora", name: str = "LlamaForCausalLM", **config: Any) -> tuple[Path, Any]:
    """A saved adapter of an NF4 base, and the model that it was trained on."""
    base = saved_base(tmp_path / "base", name)
    (base / "tokenizer.json").write_text('{"of": "base"}')
    model = trained(frozen(base, name, "nf4", double_quant=True), method, **config)
    return dsub.save_adapter(model, tmp_path / "adapter"), model


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def reloaded(folder: Path, name: str = "LlamaForCausalLM") -> Any:
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("method", ["lora", "ssb"])
def test_merge_loads_the_base_as_it_was_held_and_says_the_drift(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = adapter(tmp_path, method)
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{method} merged into the dequantised base" in printed and "drift between the two bases" in printed
    assert near(logits(reloaded(tmp_path / "out")), logits(model))
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "base"}


def test_merge_takes_another_base_type_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_SUBSPACE_CACHE", str(tmp_path / "cache"))  # others may have had the same base elsewhere
    folder, _ = adapter(tmp_path)
    (folder / "tokenizer.json").write_text('{"of": "adapter"}')
    os.rename(tmp_path / "base", tmp_path / "moved")
    command = ["merge", str(folder), str(tmp_path / "out"), "--base", "original", "--dtype", "bfloat16"]
    assert main(command) == 2
    assert "which is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--base-model", str(tmp_path / "moved"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] == "original" and told["dtype"] == "bfloat16" and 0 < told["total_drift"] < 0.2
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "adapter"}


def test_what_loading_the_base_has_to_say_is_one_line_of_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_base(tmp_path / "base", "LlamaForCausalLM")
    tensors = load_file(base / "model.safetensors") | {"vision_tower.weight": torch.ones(2)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = dsub.save_adapter(trained(frozen(base, "LlamaForCausalLM", "nf4"), "lora"), tmp_path / "adapter")
    capsys.readouterr()
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "vision_tower" in line]
    assert len(said) == 1 and said[0].startswith("notice: ") and said[0].endswith("not read: vision_tower (1 tensor)")


def test_a_classifier_is_merged_with_its_head(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    folder, model = adapter(tmp_path, name=name, modules_to_save=["classifier"])
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 0
    assert near(logits(reloaded(tmp_path / "out", name)), logits(model))


@pytest.mark.parametrize(
    ("method", "command", "message"),
    [
        ("houlsby", "merge", "error: method houlsby cannot be merged: "),
        ("houlsby", "export", "error: method houlsby has no exact form in PEFT; accepted: save_adapter"),
        ("ssb", "export", "error: method ssb has no exact form in PEFT; accepted: merge, or approximate_rank"),
    ],
)
def test_what_is_refused_is_one_sentence_and_status_2(
    method: str, command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if method not in dsub.methods():
        pytest.skip(f"{method} is not registered")
    folder = dsub.save_adapter(trained(tiny_model(), method), tmp_path / "adapter")
    assert main([command, str(folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_merge_without_a_known_base_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dsub.save_adapter(trained(tiny_model()), tmp_path / "adapter")
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 2
    assert "does not say which base model it is for" in capsys.readouterr().err


def test_export_needs_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = adapter(tmp_path, "trilora" if "trilora" in dsub.methods() else "lora")
    os.rename(tmp_path / "base", tmp_path / "moved")
    assert main(["export", str(folder), str(tmp_path / "out"), "--form", "lora", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["form"] == "lora" and told["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    assert theirs.peft_config["default"].r == told["rank"] and model is not None


def test_export_measures_an_approximation_on_the_base_that_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapter(tmp_path, "ssb")
    command = ["export", str(folder), str(tmp_path / "out"), "--approximate-rank", "4"]
    assert main(command) == 2
    assert "is told by its base alone" in capsys.readouterr().err
    assert main([*command, "--base-model", str(tmp_path / "base")]) == 0
    assert "relative error of the updates" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["lora", "dora", "adalora", "ia3", "vera", "miss", "oft", "prompt", "prefix"])
def test_import_rewrites_pefts_adapter_without_a_base(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case not in dsub.methods():
        pytest.skip(f"{case} is not registered")
    tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    layers = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    config = {
        "lora": lambda: lora(),
        "dora": lambda: lora(use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(**layers, init_r=4, total_step=10),
        "ia3": lambda: peft.IA3Config(**layers, feedforward_modules=["down_proj"]),
        "vera": lambda: peft.VeraConfig(**layers, r=5),
        "miss": lambda: peft.MissConfig(**layers, r=5),
        "oft": lambda: peft.OFTConfig(**layers, oft_block_size=4),
        "prompt": lambda: peft.PromptTuningConfig(**tokens),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
    }[case]()
    folder, expected = written(tmp_path / "peft", config)
    assert main(["import", str(folder), str(tmp_path / "own")]) == 0
    assert f"as {case}, " in capsys.readouterr().out
    ours = logits(dsub.load_adapter(tiny_model(), tmp_path / "own"))
    assert near(ours, expected[:, -ours.shape[1] :])
    assert main(["inspect", str(tmp_path / "own")]) == 0
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "back")]) == 0
    theirs = logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "back").eval())
    assert near(theirs, expected)
    assert "dsub.load_adapter(" in (tmp_path / "own" / "README.md").read_text()


@pytest.mark.skipif("pissa" not in dsub.methods(), reason="pissa is not registered")
def test_import_asks_for_the_base_where_the_start_is_made_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = written(tmp_path / "peft", lora(init_lora_weights="pissa"))
    assert main(["import", str(folder), str(tmp_path / "own")]) == 2
    assert (
        "init_lora_weights is 'pissa', and what the adapter starts from is made from its base"
        in capsys.readouterr().err
    )
    saved_base(tmp_path / "base")
    for place in ("base", "peft"):
        (tmp_path / place / "tokenizer.json").write_text(json.dumps({"of": place}))
    assert main(["import", str(folder), str(tmp_path / "own"), "--base-model", str(tmp_path / "base")]) == 0
    model = dsub.load_adapter(frozen(tmp_path / "base"), tmp_path / "own")
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert json.loads((tmp_path / "own" / "tokenizer.json").read_text()) == {"of": "peft"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "own", "peft"]


@pytest.mark.skipif("pissa" not in dsub.methods(), reason="pissa is not registered")
def test_import_loads_the_base_as_the_model_of_the_adapters_task(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    config = lora(init_lora_weights="pissa", target_modules=["query"], task_type="SEQ_CLS")
    folder, expected = written(tmp_path / "peft", config, name)
    base = saved_base(tmp_path / "base", name)
    assert main(["import", str(folder), str(tmp_path / "own"), "--base-model", str(base)]) == 0
    model = dsub.load_adapter(frozen(base, name), tmp_path / "own")
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_import_of_an_unknown_kind_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = written(tmp_path / "peft", lora())
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {"peft_type": "LOHA"}))
    assert main(["import", str(folder), str(tmp_path / "own")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: peft_type is 'LOHA'") and said.count("\n") == 1 and not (tmp_path / "own").exists()


def test_a_terminated_merge_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while weights are written: the process ends, and so does what it had begun."""
    base = saved_base(tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
                      num_key_value_heads=8)  # fmt: skip
    dsub.save_adapter(trained(frozen(base, storage="bf16", dtype=None)), tmp_path / "adapter")
    command = [sys.executable, "-m", "dist_subspace", "merge", str(tmp_path / "adapter"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    hidden, deadline = tmp_path / ".out.partial", time.monotonic() + 300
    while not hidden.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (128 + signal.SIGTERM, 0), process.stderr.read() if process.stderr else ""
    assert not hidden.exists() and ((tmp_path / "out").exists() == (process.returncode == 0))
