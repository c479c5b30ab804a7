"""A run that begins with an adapter that there is already: its weights, and nothing else of the run that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dist_subspace as dsub
from dist_subspace.interchange.description import WEIGHTS
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.run_folder.trainer_state import read_trainer_state
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model, make_records
from tests.whole_runs import configuration, losses, run_here

METHODS = ("lora", "dora", "pissa", "vera", "lora-fa", "adalora", "prompt", "spectral-additive", "ia3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    make_records(path / "other.jsonl", 40)
    return path


def first_run(folder: Path, run: Path, method: str) -> Path:
    config = configuration(folder, run, global_batch_size=4, max_steps=8, warmup_steps=0)
    config["subspace"] = {"method": method}
    assert run_here(config) == EXIT_OK
    return run


def follow_up(folder: Path, run: Path, source: Path, **subspace: Any) -> dict[str, Any]:
    """Other data, another seed, another learning rate."""
    config = configuration(folder, run, global_batch_size=4, max_steps=6, seed=7, learning_rate=1e-30, weight_decay=0.0)
    config["data"]["train"] = str(folder / "other.jsonl")
    config["subspace"] = {"init_from": str(source), **subspace}
    return config


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def logits(folder: Path, source: Path) -> Tensor:
    with torch.no_grad():
        model = dsub.load_adapter(dsub.load_frozen(folder / "model", storage="fp32"), source).eval()
        return model(input_ids=torch.arange(3, 19)[None]).logits


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_run(folder, tmp_path_factory.mktemp("first") / "run", "lora")


@pytest.mark.parametrize("source", ["adapter", "checkpoint-8", "."])
def test_an_adapter_a_checkpoint_and_a_run_are_taken(source: str, folder: Path, first: Path, tmp_path: Path) -> None:
    assert run_here(follow_up(folder, tmp_path / "second", first / source)) == EXIT_OK
    assert (logits(folder, tmp_path / "second" / "adapter") - logits(folder, first / "adapter")).abs().max() < 1e-5
    state = read_trainer_state(tmp_path / "second" / "checkpoint-6")
    assert (state.step, state.optimizer_steps) == (6, 6)


@pytest.mark.parametrize(
    "method", [m if m == "spectral-additive" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_it_begins_with_the_function_of_the_adapter_trains_on_and_resumes_without_the_folder(
    method: str, folder: Path, tmp_path: Path
) -> None:
    first = first_run(folder, tmp_path / "first", method)
    run = tmp_path / "second"
    config = follow_up(folder, run, first / "adapter")
    config["training"]["learning_rate"] = 0.01
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2
    whole, curve = adapter(run / "checkpoint-6"), losses(run)
    before = adapter(first / "adapter")
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    still = follow_up(folder, tmp_path / "still", first / "adapter")
    assert run_here(still) == EXIT_OK
    change = (logits(folder, tmp_path / "still" / "adapter") - logits(folder, first / "adapter")).abs().max()
    assert change < (1e-2 if method == "adalora" else 1e-4)  # whose schedule begins anew, and cuts the weakest triplets
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(first)
    assert run_on_ranks(2, run_here, config) == [EXIT_OK] * 2, read_status(run)
    again = adapter(run / "checkpoint-6")
    assert losses(run) == curve and all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def of_peft(folder: Path, out: Path, **fields: Any) -> Tensor:
    """An adapter that PEFT made, and the logits of PEFT's own reading."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19)[None]).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_of_peft_is_taken_and_kept_in_checkpoints(
    fields: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    expected = of_peft(folder, tmp_path / "peft", **fields)
    config = follow_up(folder, tmp_path / "run", tmp_path / "peft")
    assert run_here(config) == EXIT_OK
    assert (logits(folder, tmp_path / "run" / "adapter") - expected).abs().max() < 1e-5
    config["training"]["max_steps"] = 8
    shutil.rmtree(tmp_path / "peft")
    assert run_here(config) == EXIT_OK
    assert (logits(folder, tmp_path / "run" / "adapter") - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("subspace", "words"),
    [
        ({"method": "dora"}, ["subspace.method is 'dora'", "has 'lora'"]),
        ({"rank": 5}, ["subspace.rank is 5", "has 16"]),
        ({"alpha": 3.0}, ["subspace.alpha is 3.0", "has"]),
        ({"rank_pattern": {"q_proj": 2}}, ["subspace.rank_pattern is {'q_proj': 2}, but", "has {}"]),
        ({"alpha_pattern": {"q_proj": 3.0}}, ["subspace.alpha_pattern is {'q_proj': 3.0}, but", "has {}"]),
        ({"target_modules": ["q_proj"]}, ["does not fit", "which this model has no layer for"]),
        ({"modules_to_save": ["lm_head"]}, ["does not fit", "the adapter lacks", "lm_head"]),
        ({"options": {"lr_ratio": 4.0}, "dropout": 0.2}, []),
    ],
)
def test_what_contradicts_the_adapter_is_refused_naming_both(
    subspace: dict[str, Any], words: list[str], folder: Path, tmp_path: Path, first: Path
) -> None:
    config = follow_up(folder, tmp_path / "run", first / "adapter", **subspace)
    config["training"]["max_steps"] = 1
    config["training"]["warmup_steps"] = 0
    status = run_here(config)
    message = (read_status(tmp_path / "run") or {})["message"]
    assert status == (EXIT_USAGE if words else EXIT_OK), message
    assert all(word in message for word in [*words, *(["subspace.init_from"] if words else [])])


@pytest.mark.parametrize("source", ["adapter", "checkpoint-2"])
def test_rows_of_new_tokens_go_to_the_tokens_that_they_were_trained_for(
    source: str, with_tokens: Path, folder: Path, tmp_path: Path
) -> None:
    config = follow_up(folder, tmp_path / "run", with_tokens / source)
    config["training"] |= {"max_steps": 1, "warmup_steps": 0}
    config["model"]["new_tokens"] = ["<b>", "<a>"]  # which get the same ids
    assert run_here(config) == EXIT_USAGE
    message = (read_status(tmp_path / "run") or {})["message"]
    assert message.startswith("model.new_tokens is ['<b>', '<a>'], but the adapter of subspace.init_from")
    assert "has rows for ['<a>', '<b>']; accepted: the same tokens in the same order" in message
    config["model"]["new_tokens"] = ["<a>", "<b>"]
    assert run_here(config) == EXIT_OK


@pytest.fixture(scope="module")
def with_tokens(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokens") / "run"
    config = configuration(folder, run, global_batch_size=4, max_steps=2)
    config["model"]["new_tokens"] = ["<a>", "<b>"]
    assert run_here(config) == EXIT_OK
    return run


def test_an_adapter_for_another_base_and_a_folder_without_one_are_refused(
    folder: Path, first: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", layers=1)
    other = follow_up(folder, tmp_path / "run", first / "adapter")
    other["model"]["path"] = str(tmp_path / "model")
    for source, words in (
        (first / "adapter", "it belongs to another base model"),
        (tmp_path / "no", "holds no adapter"),
    ):
        other["subspace"]["init_from"] = str(source)
        assert run_here(other) == EXIT_USAGE
        message = (read_status(tmp_path / "run") or {})["message"]
        assert words in message and "subspace.init_from" in message


def test_a_run_that_began_anew_goes_on_without_the_adapter_and_says_so(
    folder: Path, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first, tmp_path / "run")
    config = configuration(folder, tmp_path / "run", global_batch_size=4, max_steps=9, warmup_steps=0)
    config["subspace"] = {"init_from": str(tmp_path / "gone")}
    assert run_here(config) == EXIT_OK
    assert "subspace.init_from is not read: the run goes on from checkpoint-8" in capfd.readouterr().out
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["begun"] == {} and state["fingerprints"] == read_trainer_state(first / "checkpoint-8").fingerprints
