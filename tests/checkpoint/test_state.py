"""A checkpoint is continued with what it was made with: another method, base, data, factor file or frozen factor is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from dist_subspace.checkpoint.state import StoredState
from dist_subspace.pages import give_back_freed
from dist_subspace.run_folder.status import EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.subspace import SubspaceConfig
from tests.benchmarks.load import Peak, anonymous
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model, make_records
from tests.whole_runs import assert_same, losses, rewritten, run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states")
    make_model(path / "model", layers=1)
    make_records(path / "train.jsonl", 12)
    return path


def configuration(folder: Path, run: Path, **subspace: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1} | subspace,
        "data": {
            "train": str(folder / "train.jsonl"),
            "max_length": 64,
            "packing": False,
            "cache_dir": str(folder / "tokens"),
        },
        "training": {"max_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "deepspeed": {"preset": "zero0"},
        "checkpoint": {"save_steps": 1},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    assert run_here(configuration(folder, folder / "run")) == EXIT_OK
    return folder / "run"


def message(run: Path) -> str:
    return str((read_status(run) or {})["message"])


# Of each field of a method's configuration a value that the checkpoint was not made with.
OTHERS: dict[str, dict[str, Any]] = {
    "method": {"method": "rslora"},
    "rank": {"rank": 3},
    "alpha": {"alpha": 9},
    "dropout": {"dropout": 0.2},
    "target_modules": {"target_modules": ["q_proj", "v_proj"]},
    "target_parameters": {"target_parameters": ["experts.down_proj"]},
    "expert_parameters": {"target_parameters": ["experts.down_proj"], "expert_parameters": "shared"},
    "exclude_modules": {"exclude_modules": ["down_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "constraint": {"constraint": "mpc_o"},
    "constraint_weight": {"constraint_weight": 0.2},
    "options": {"options": {"lr_ratio": 4.0}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
}
SET_ELSEWHERE = {"new_tokens": ("model", {"new_tokens": ["<a>"]}), "seed": ("training", {"seed": 1})}


def test_every_field_of_a_method_has_its_case() -> None:
    assert {field.name for field in dataclasses.fields(SubspaceConfig)} == OTHERS.keys() | SET_ELSEWHERE.keys()


@pytest.mark.parametrize("name", [*OTHERS, *SET_ELSEWHERE])
def test_a_method_that_differs_in_anything_is_refused(name: str, folder: Path, made: Path) -> None:
    config = configuration(folder, made)
    section, change = SET_ELSEWHERE.get(name, ("subspace", OTHERS.get(name, {})))
    config[section] |= change
    assert run_here(config) == EXIT_USAGE
    assert "checkpoint-2 was made with another method (stored " in message(made)
    assert "set checkpoint.allow_different=[method]" in message(made)


def test_an_allowed_method_that_its_tensors_do_not_fit_is_refused_in_a_sentence(folder: Path, made: Path) -> None:
    config = configuration(folder, made, rank=3)
    config["training"]["max_steps"] = 3
    assert run_here(config, ["checkpoint.allow_different=[method]"]) == EXIT_USAGE
    assert "lora_A, which has 96 here; it belongs to another rank, or to another base model" in message(made)


MIB = 2**20
TENSORS, ENTRIES = 12, 2 * MIB  # of 8 MiB each


def asked_for(file: str) -> tuple[int, bool]:
    """On a rank: the most bytes that were held while every tensor of the file was asked for, and whether each had its values."""
    keys = [f"layer.{number}.{kind}" for number in range(TENSORS // 3) for kind in ("exp_avg", "exp_avg_sq", "master")]
    gc.collect()
    give_back_freed()
    before = anonymous()
    with Peak() as peak:
        stored = StoredState(Path(file), dict.fromkeys(keys, 4 * ENTRIES), ["layer.2", "layer.1"])
        right = all(bool((stored[key] == number).all()) for number, key in enumerate(keys))
    return peak.bytes - before, right and sorted(stored) == sorted(keys) and list(stored)[:3] == keys[6:9]


def test_no_rank_holds_more_of_the_optimizers_state_than_a_part_while_a_run_is_resumed(tmp_path: Path) -> None:
    """docs/failures.md, "Every rank reads all optimizer states"."""
    keys = [f"layer.{number}.{kind}" for number in range(TENSORS // 3) for kind in ("exp_avg", "exp_avg_sq", "master")]
    file = tmp_path / "optimizer.safetensors"
    save_file({key: torch.full((ENTRIES,), float(number)) for number, key in enumerate(keys)}, file)
    for most, right in run_on_ranks(2, small_groups, str(file)):
        assert right and most < 5 * 8 * MIB < file.stat().st_size / 2, most / MIB


def small_groups(file: str) -> tuple[int, bool]:
    """Two tensors at a time, where a run sends 64 MiB."""
    before, StoredState.GROUP = StoredState.GROUP, 16 * MIB
    try:
        return asked_for(file)
    finally:
        StoredState.GROUP = before


def asked_of_nothing(file: str) -> str:
    """What a rank meets where rank 0 cannot read."""
    try:
        StoredState(Path(file), {"layer.master": 4}, [])["layer.master"]
    except Exception as error:
        return str(error)
    return "read"


def test_every_rank_learns_that_rank_0_cannot_read_the_state(tmp_path: Path) -> None:
    said = run_on_ranks(2, asked_of_nothing, str(tmp_path / "nothing.safetensors"), timeout=20)
    assert all("nothing.safetensors" in one or "rank 0" in one for one in said), said


def another_weight(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][5, 7] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def another_shape(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-5}))


def another_record(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "train.jsonl"
    file.write_text(file.read_text().replace("say 3", "say 8", 1))


def another_length(folder: Path, config: dict[str, Any]) -> None:
    config["data"]["max_length"] = 63


def a_part_held_out(folder: Path, config: dict[str, Any]) -> None:
    config["data"]["eval"] = 0.25


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_weight, "model"),
        (another_shape, "model"),
        (another_record, "data"),
        (another_length, "data"),
        (a_part_held_out, "data"),
    ],
)
def test_another_base_or_other_data_under_the_same_name_is_refused_unless_it_is_allowed(
    change: Callable[[Path, dict[str, Any]], None], what: str, folder: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "all")
    config = configuration(tmp_path / "all", tmp_path / "all" / "run")
    change(tmp_path / "all", config)
    assert run_here(config) == EXIT_USAGE
    assert f"checkpoint-2 was made with another {what} (stored " in message(tmp_path / "all" / "run")
    wrong = next(name for name in ("model", "data") if name != what)
    assert run_here(config, [f"checkpoint.allow_different=[{wrong}]"]) == EXIT_USAGE
    assert run_here(config, [f"checkpoint.allow_different=[{what}]", "training.max_steps=2"]) == EXIT_OK


def test_the_same_base_and_data_in_another_place_go_on(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    config = configuration(tmp_path / "moved", tmp_path / "moved" / "run")
    config["training"]["max_steps"] = 3
    assert run_here(config) == EXIT_OK, message(tmp_path / "moved" / "run")
    assert losses(tmp_path / "moved" / "run")[:2] == losses(made)


def tampered(file: Path) -> None:
    """The same tensors, one number of each another one."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for tensor in tensors.values():
        tensor.view(-1)[0] += 0.5
    save_file(tensors, file)


@pytest.mark.parametrize("method", ["pissa", "spectral-additive", "dora"])
def test_a_factor_file_that_was_replaced_is_refused_and_one_that_is_lost_is_made_again(
    method: str, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, method=method, alpha=None)
    assert run_here(config) == EXIT_OK
    curve = losses(run)
    shutil.copytree(run / "checkpoint-2", tmp_path / "expected")
    files = sorted((run / "factors").glob("*.safetensors"))
    kept = files[2].read_bytes()
    tampered(files[2])
    shutil.rmtree(run / "checkpoint-2")
    assert run_here(config) == EXIT_USAGE
    assert f"{files[2].name} is not the file that checkpoint-1 was trained with" in message(run)
    files[2].unlink()
    assert run_here(config) == EXIT_OK
    assert files[2].read_bytes() == kept and losses(run) == curve
    described = json.loads((run / "adapter" / "dist_subspace.json").read_text())
    assert (
        described["method"] == method and not {"factors", "statistics"} & described.keys()
    )  # it needs no file of the run
    assert_same(run / "checkpoint-2" / "adapter_model.safetensors", tmp_path / "expected" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "frozen"), [("lora-fa", ".lora_A.weight"), ("vera", ".vera_A"), ("vera", ".vera_B")]
)
def test_a_frozen_factor_that_is_not_the_checkpoints_is_refused(
    method: str, frozen: str, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, method=method, alpha=None)
    assert run_here(config) == EXIT_OK
    tensors = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    held = [name for name in tensors if name.endswith(frozen)]
    assert held, f"the checkpoint of {method} holds no {frozen}"
    name = held[-1]
    tensors[name].view(-1)[-1] += 1e-3
    rewritten(run / "checkpoint-2", "adapter_model.safetensors", save(tensors))
    config["training"]["max_steps"] = 3
    assert run_here(config) == EXIT_USAGE
    assert f"checkpoint-2 holds another {name} than this machine draws from the same seed" in message(run)
