"""Both layouts of an adapter's description are read by everything that reads adapters, and no folder names this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dist_subspace as dsub
from dist_subspace.api import load_adapted
from dist_subspace.cli import main
from dist_subspace.errors import UsageError
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS, config_texts, read_description
from dist_subspace.run_folder.manifest import verify, write_manifest
from dist_subspace.training.run import train
from tests.interchange.trained import frozen, saved_base, trained
from tests.tiny_models import logits, tiny_model
from tests.tiny_run import make_model, make_records


def as_before(folder: Path, base: Path) -> None:
    """The folder as it was written before: our entries inside PEFT's file, null for what PEFT does not know, a path."""
    described = json.loads((folder / CONFIG).read_text())
    if described["peft_type"].startswith("DIST_SUBSPACE"):
        described["peft_type"] = None
    ours = json.loads((folder / OWN_CONFIG).read_text())
    ours.pop("base_fingerprint", None)
    described |= {"base_model_name_or_path": str(base), "dist_subspace": ours}
    (folder / CONFIG).write_text(json.dumps(described))
    (folder / OWN_CONFIG).unlink()
    tensors = load_file(folder / WEIGHTS)
    shorter = {key.replace("magnitude_vector.weight", "magnitude_vector"): t for key, t in tensors.items()}
    save_file(shorter, folder / WEIGHTS)


@pytest.mark.parametrize("method", ["lora", "dora", "ssb"])
def test_a_folder_of_the_former_layout_is_read_by_every_reader(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_base(tmp_path / "base")
    model = trained(frozen(base), method)
    folder = dsub.save_adapter(model, tmp_path / "adapter")
    assert main(["inspect", str(folder), "--json"]) == 0
    now = json.loads(capsys.readouterr().out)
    as_before(folder, base)
    torch.testing.assert_close(logits(dsub.load_adapter(tiny_model(), folder)), logits(model))
    torch.testing.assert_close(logits(load_adapted(folder)), logits(model))
    assert main(["inspect", str(folder), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    alike = {"method", "peft_type", "format", "layers", "parameters", "by_layer", "rank", "mergeable"}
    assert {key: now[key] for key in alike} == {key: before[key] for key in alike}
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    arguments = ["--approximate-rank", "32", "--base-model", str(base)] if method == "ssb" else []
    assert main(["export", str(folder), str(tmp_path / "exported"), *arguments]) == 0
    again = dsub.import_peft(tiny_model(), tmp_path / "exported")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-3)


def run(folder: Path, steps: int, method: str) -> int:
    return train(
        {
            "model": {"path": str(folder / "model"), "storage": "fp32"},
            "subspace": {"method": method, "rank": 2},
            "data": {"train": str(folder / "train.jsonl"), "max_length": 32, "packing": False},
            "training": {"max_steps": steps, "global_batch_size": 2, "learning_rate": 0.01},
            "deepspeed": {"preset": "zero0"},
            "checkpoint": {"save_steps": 1},
            "run": {"output_dir": str(folder / "run"), "report_to": "none"},
        }
    )


def texts_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja"))


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_a_run_names_no_local_path_and_goes_on_from_a_checkpoint_of_the_former_layout(
    method: str, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    make_records(tmp_path / "train.jsonl", 12)
    assert run(tmp_path, 2, method) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert OWN_CONFIG in json.loads((checkpoint / "MANIFEST.json").read_text()) and verify(checkpoint) is None
    for folder in (checkpoint, tmp_path / "run" / "adapter"):
        assert str(tmp_path) not in texts_of(folder), folder
        found = load_adapted(folder)
        assert Path(found.config._name_or_path) == tmp_path / "model"
    dsub.export_peft(checkpoint, tmp_path / "exported", "lora" if method == "pissa" else "auto", report=None)
    assert str(tmp_path) not in texts_of(tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer_config.json").exists()
    as_before(checkpoint, tmp_path / "model")
    (checkpoint / "MANIFEST.json").unlink()
    write_manifest(checkpoint)
    assert run(tmp_path, 3, method) == 0
    assert (tmp_path / "run" / "checkpoint-3" / OWN_CONFIG).exists()


# Where the base is found again.


def test_a_base_anywhere_on_this_machine_is_found_by_what_it_holds(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "far" / "away" / "base")
    model = trained(frozen(base))
    folder = dsub.save_adapter(model, tmp_path / "adapters" / "mine")
    assert str(tmp_path) not in texts_of(folder)
    torch.testing.assert_close(logits(load_adapted(folder)), logits(model))
    dsub.merge(load_adapted(folder), tmp_path / "merged", report=None)


def test_another_model_of_the_same_name_is_never_taken_for_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_SUBSPACE_CACHE", str(tmp_path / "cache"))  # others may have had the same base elsewhere
    base = saved_base(tmp_path / "there" / "base")
    folder = dsub.save_adapter(trained(frozen(base)), tmp_path / "adapter")
    saved_base(tmp_path / "base", seed=1)  # beside the adapter, and where the command is given
    monkeypatch.chdir(tmp_path)
    assert Path(load_adapted(folder).config._name_or_path) == base
    os.rename(base, tmp_path / "there" / "moved")
    with pytest.raises(
        UsageError, match=r"base model is '\./base', which is no folder that is found here \(.*is another"
    ):
        load_adapted(folder)
    assert load_adapted(folder, tmp_path / "there" / "moved") is not None


def test_a_base_that_was_given_by_a_relative_path_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it lies is remembered in the folder that DIST_SUBSPACE_CACHE names."""
    monkeypatch.setenv("DIST_SUBSPACE_CACHE", str(tmp_path / "cache"))
    base = saved_base(tmp_path / "here" / "base")
    monkeypatch.chdir(base.parent)
    model = trained(frozen(Path("base")))
    folder = dsub.save_adapter(model, tmp_path / "far" / "adapter")
    (remembered,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert remembered.read_text() == f"{base}\n"
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(load_adapted(folder)), logits(model))


def test_a_run_whose_base_has_another_name_is_not_asked_for_it(tmp_path: Path) -> None:
    """Of an adapter without a fingerprint, copied into the folder of a stranger's run."""
    from dist_subspace.interchange.base_model import find_base

    other = saved_base(tmp_path / "other")
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"path": str(other)}}))
    described = {"base_model_name_or_path": "org/base"}
    assert find_base(tmp_path / "adapter", described, lambda place: "") == "org/base"


def test_without_a_fingerprint_no_folder_beside_the_adapter_is_taken_for_its_name_alone(tmp_path: Path) -> None:
    from dist_subspace.interchange.base_model import ELSEWHERE, find_base

    saved_base(tmp_path / "base")
    with pytest.raises(UsageError, match=r"'\./base', which is no folder that is found here; accepted"):
        find_base(tmp_path / "adapter", {"base_model_name_or_path": f"./base{ELSEWHERE}"}, lambda place: "")


def test_the_forms_of_a_base_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_subspace.interchange.base_model import base_name, short_base

    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    old = tmp_path / "models--gpt2" / "snapshots" / ("1" * 40)
    for folder in (snapshot, old, tmp_path / "models" / "gpt2"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {
        "acme/tiny": "acme/tiny",
        "gpt2": "gpt2",
        str(snapshot): "acme/tiny",
        str(old): "gpt2",
        "models/gpt2": "./models/gpt2",  # which the hub might have too
        "./models/../models/gpt2": "./models/gpt2",
        str(tmp_path / "models" / "gpt2"): "./gpt2",
        "/no/such/folder": "./folder",
    }
    assert {path: short_base(base_name(path) or "") for path in names} == names
    assert base_name(None) is None and base_name("") is None


# Tokenizers go with adapters.


def with_tokenizer(base: Path) -> Path:
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "tokenizer_config.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return base


TOKENIZER = ["additional_chat_templates", "tokenizer.json", "tokenizer_config.json"]


def tokenizer_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, OWN_CONFIG, WEIGHTS, "README.md"))


@pytest.mark.parametrize("loaded_by", ["us", "transformers"])
def test_a_saved_and_an_exported_adapter_bring_the_bases_tokenizer(loaded_by: str, tmp_path: Path) -> None:
    base = with_tokenizer(saved_base(tmp_path / "base"))
    plain: Any = frozen(base) if loaded_by == "us" else transformers.AutoModelForCausalLM.from_pretrained(base)
    model = trained(plain)
    dsub.save_adapter(model, tmp_path / "adapter")
    dsub.export_peft(model, tmp_path / "from-model", report=None)
    dsub.export_peft(tmp_path / "adapter", tmp_path / "from-folder", report=None)
    for folder in ("adapter", "from-model", "from-folder"):
        assert tokenizer_in(tmp_path / folder) == TOKENIZER
    assert main(["import", str(tmp_path / "from-folder"), str(tmp_path / "own")]) == 0
    assert tokenizer_in(tmp_path / "own") == TOKENIZER


def test_a_tokenizer_that_is_given_or_there_already_is_not_the_bases(tmp_path: Path) -> None:
    base = with_tokenizer(saved_base(tmp_path / "base"))
    model = trained(frozen(base))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text('{"of": "user"}')
    dsub.save_adapter(model, tmp_path / "there")
    dsub.save_adapter(model, tmp_path / "given", tokenizer=tmp_path / "there")
    for folder in ("there", "given"):
        assert json.loads((tmp_path / folder / "tokenizer.json").read_text()) == {"of": "user"}
        assert tokenizer_in(tmp_path / folder) == ["tokenizer.json"]
    larger = trained(frozen(base), new_tokens=[96])
    dsub.save_adapter(larger, tmp_path / "larger")
    assert tokenizer_in(tmp_path / "larger") == []


def test_a_description_without_entries_of_ours_is_pefts_file_alone() -> None:
    assert list(config_texts({"peft_type": "LORA"})) == [CONFIG]
    assert list(config_texts({"peft_type": "LORA", "dist_subspace": {"method": "lora"}})) == [OWN_CONFIG, CONFIG]


def test_a_folder_that_lost_our_entries_is_said_to_have_lost_them(tmp_path: Path) -> None:
    dsub.save_adapter(trained(tiny_model(), "ssb"), tmp_path)
    (tmp_path / OWN_CONFIG).unlink()
    with pytest.raises(
        UsageError, match=r"holds no whole adapter: dist_subspace\.json is missing; copy the folder again"
    ):
        read_description(tmp_path)


def test_a_copy_in_the_cache_is_shown_by_the_name_that_the_hub_gives_it() -> None:
    from dist_subspace.interchange.base_model import shown_name

    cached = "/home/me/.cache/huggingface/hub/models--user--name/snapshots/" + "0f" * 20
    assert shown_name(cached) == "user/name" and shown_name(Path(cached)) == "user/name"
    assert shown_name("runs/mine/adapter") == "runs/mine/adapter" and shown_name("gpt2") == "gpt2"
