"""Whole runs on the device: engines of every type, every optimizer, every preset, resumed bit for bit; and evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.run_folder.status import EXIT_OK, read_status
from dist_subspace.training.optimizers import ON_ANY_DEVICE, ON_CUDA
from dist_subspace.training.run import train

DTYPES = {None: "float32", "bf16": "bfloat16", "fp16": "float16"}
ENGINES = {None: {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}}


def configuration(folder: Path, run: Path, **training: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "storage": "nf4", "dtype": "float32"},
        "subspace": {"method": "lora", "rank": 8, "dropout": 0.1},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 48, "packing": False},
        "training": {
            "max_steps": 4,
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "full_determinism": True,
            **training,
        },
        "checkpoint": {"save_steps": 2},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def run_and_resume(config: dict[str, Any]) -> list[float]:
    """The losses of a run, which is made again from its middle: bit for bit alike, adapter and optimizer too."""
    run = Path(config["run"]["output_dir"])
    assert train(config) == EXIT_OK, read_status(run)
    curve, norms = logged(run, "loss"), logged(run, "grad_norm")
    last = {file.name: file.read_bytes() for file in (run / "checkpoint-4").glob("*.safetensors")}
    shutil.rmtree(run / "checkpoint-4")
    assert train(config) == EXIT_OK, read_status(run)
    assert logged(run, "loss") == curve and logged(run, "grad_norm") == norms and len(curve) == 4
    again = {file.name: file.read_bytes() for file in (run / "checkpoint-4").glob("*.safetensors")}
    assert again.keys() == last.keys() >= {"adapter_model.safetensors", "optimizer.safetensors"}
    assert [name for name in last if last[name] != again[name]] == []
    assert curve[-1] < curve[0]
    return curve


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_of_every_type_trains_and_resumes_bit_for_bit(
    kind: str | None, stage: int, folder: Path, tmp_path: Path
) -> None:
    config = configuration(folder, tmp_path / "run")
    config["model"]["dtype"] = DTYPES[kind]
    config["deepspeed"] = {"config": {"zero_optimization": {"stage": stage}, **ENGINES[kind]}}
    run_and_resume(config)


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_a_preset_trains_as_an_unsplit_engine_does_and_resumes(preset: str, folder: Path, tmp_path: Path) -> None:
    whole = configuration(folder, tmp_path / "whole") | {"deepspeed": {"preset": "zero0"}}
    assert train(whole) == EXIT_OK, read_status(tmp_path / "whole")
    split = configuration(folder, tmp_path / "run") | {"deepspeed": {"preset": preset}}
    assert run_and_resume(split) == pytest.approx(logged(tmp_path / "whole", "loss"), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("optim", [*ON_ANY_DEVICE, *ON_CUDA])
def test_every_optimizer_trains_and_resumes_bit_for_bit(optim: str, stage: int, folder: Path, tmp_path: Path) -> None:
    """The adapter has matrices above and below 4096 entries: bitsandbytes holds the moments of the large ones in 8 bits."""
    config = configuration(folder, tmp_path / "run", optim=optim, learning_rate=1e-1 if optim == "sgd" else 3e-3)
    config["model"]["path"] = str(folder / "wide")
    config["subspace"] = {"method": "lora", "rank": 32, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    config["deepspeed"] = {"preset": f"zero{stage}"}
    run_and_resume(config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["zero0", "zero3"])
def test_the_held_out_loss_is_transformers_own_of_the_saved_adapter_on_the_cpu(
    preset: str, checkpointing: bool, folder: Path, tmp_path: Path
) -> None:
    from dist_subspace import load_adapter, load_frozen

    config = configuration(
        folder, tmp_path / "run", gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.5
    )
    config["model"]["storage"] = "fp32"
    config["subspace"] = {"method": "lora", "rank": 4}
    config["data"]["eval"] = str(folder / "eval.jsonl")
    config["deepspeed"] = {"preset": preset}
    assert train(config) == EXIT_OK, read_status(tmp_path / "run")
    evaluated = logged(tmp_path / "run", "eval_loss")[-1]
    model = load_frozen(folder / "model", storage="fp32", device="cpu")
    load_adapter(model, tmp_path / "run" / "adapter").eval()
    assert plain_loss(model, folder) == pytest.approx(evaluated, rel=1e-4)


def plain_loss(model: Any, folder: Path) -> float:
    """The mean over all answers' tokens of the held-out records, each row alone: transformers' own loss on the CPU."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, targets = 0.0, 0
    for line in (folder / "eval.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        asked = tokenizer(prompt)["input_ids"]
        answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([asked + answer])
        labels = torch.tensor([[-100] * len(asked) + answer])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        targets += len(answer)
    return total / targets


def test_full_determinism_gives_the_same_run_twice_on_bf16_products(folder: Path, tmp_path: Path) -> None:
    curves = []
    for name in ("first", "second"):
        config = configuration(folder, tmp_path / name)
        config["model"]["dtype"] = "bfloat16"
        config["data"] |= {"packing": True, "max_length": 64}
        config["subspace"] = {"method": "dora", "rank": 4, "dropout": 0.1}
        assert train(config) == EXIT_OK, read_status(tmp_path / name)
        curves.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert curves[0] == curves[1]
    assert torch.are_deterministic_algorithms_enabled()
