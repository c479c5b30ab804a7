"""Whole runs of a tiny model: what they are configured by, how they are started, and what they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_subspace.training.run import train


def configuration(folder: Path, run: Path, **training: Any) -> dict[str, Any]:
    """Ten samples a step in micro-batches of two: 5 rounds on one rank, 2 + 2 + 1 on two and on three."""
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 48, "packing": False},
        "training": {
            "max_steps": 6,
            "global_batch_size": 10,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            **training,
        },
        "checkpoint": {"save_steps": 3},
        "run": {"output_dir": str(run), "logging_steps": 1, "report_to": "none"},
    }


def two_kept_configuration(sources: Path, run: Path) -> dict[str, Any]:
    """Four steps, a checkpoint each, of which two stay: the newest, and step 2, which is best (the metric is turned round)."""
    return {
        "model": {"path": str(sources / "model"), "storage": "fp32"},
        "subspace": {"method": "pissa", "rank": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(sources / "train.jsonl"), "max_length": 48, "packing": False, "eval": 0.2},
        "training": {
            **{"max_steps": 4, "learning_rate": 0.01, "global_batch_size": 4, "per_device_train_batch_size": 4},
        },
        "checkpoint": {
            **{"save_steps": 1, "save_total_limit": 2, "metric_for_best_model": "loss", "greater_is_better": True},
        },
        "run": {"output_dir": str(run), "logging_steps": 1, "eval_steps": 2, "report_to": "none"},
    }


def run_here(config: dict[str, Any], overrides: Sequence[str] = ()) -> int:
    """In a rank of a pool, or in this process."""
    return train(config, overrides)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewritten(checkpoint: Path, name: str, content: bytes) -> None:
    """Another file in a checkpoint, whose manifest vouches for it."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The figures of the TensorBoard files: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
