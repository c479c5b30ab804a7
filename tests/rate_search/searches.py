"""Searches of a tiny model, and the runs that they are compared with."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_subspace.cli import main
from dist_subspace.config import load_config
from dist_subspace.rate_search.bench import Bench, Tried
from dist_subspace.rate_search.room import search_config, search_plan
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.display import Display
from dist_subspace.training.observer import Observer
from dist_subspace.training.plan import Plan, make_plan
from dist_subspace.training.run import train

STEPS, RATE, OTHER = 6, 3e-2, 4e-1


def configuration(
    folder: Path, run: str, method: str = "lora", preset: str = "none", **training: Any
) -> dict[str, Any]:
    """Six samples a step in micro-batches of two; what the short runs of a search are, as a run of its own."""
    return {
        "model": {"path": str(folder / "model"), "storage": "fp32"},
        "subspace": {"method": method, "rank": 2, "dropout": 0.1, "options": OPTIONS.get(method, {})},
        "data": {
            **{"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
            **{"max_length": 48, "packing": False, "cache_dir": str(folder / "tokens")},
        },
        "training": {
            **{"max_steps": STEPS, "global_batch_size": 6, "per_device_train_batch_size": 2, "learning_rate": RATE},
            **{"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "weight_decay": 0.1},
            **{"gradient_checkpointing": False, **training},
        },
        "deepspeed": {"preset": preset},
        "checkpoint": {"save_steps": STEPS},
        "run": {"output_dir": str(folder / run), "logging_steps": 1, "eval_steps": 3, "report_to": "none"},
    }


# Plans that do something within six steps.
OPTIONS = {
    "adalora": {"warmup_steps": 1, "final_steps": 2, "interval": 1},
    "flexlora": {"warmup_steps": 1, "final_steps": 1, "interval": 1},
    "lora-dash": {"warmup_steps": 2},
}


def bench_of(config: dict[str, Any], folder: Path) -> Bench:
    """Collective: what trains the rates of a search in that folder."""
    plan = plan_of(config, folder)
    return Bench(plan, Observer(Display(enabled=False, total_steps=0), None, None, plan.device))


def plan_of(config: dict[str, Any], folder: Path, steps: int | None = STEPS, samples: int = 100) -> Plan:
    made = make_plan(search_config(load_config(config), RunFolder(folder)), lambda text: None)
    return search_plan(made, steps, samples)


def differences(folder: str, method: str, preset: str, stock: dict[str, Any] | None = None) -> list[str]:
    """Collective: what a rate that is tried between others has otherwise than a run of its own at that rate, bit for bit.

    stock: a DeepSpeed JSON in the place of the preset, whose name is one of folders alone then.
    """
    home = Path(folder)
    config = configuration(home, f"run-{method}-{preset}", method, preset)
    if stock is not None:
        config["deepspeed"] = {"config": stock}
        config["model"] |= {"storage": "bf16", "dtype": "bfloat16"}
    with redirect_stdout(io.StringIO()):
        assert train(config) == 0
    run = Path(config["run"]["output_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bench = bench_of(config, home / f"search-{method}-{preset}")
    one, other = Tried(RATE), Tried(OTHER)
    for tried, steps in ((other, 3), (one, 3), (other, STEPS), (one, STEPS)):
        bench.train(tried, steps)
    found = []
    if one.losses != [line["loss"] for line in lines if "loss" in line]:
        found.append(f"losses: {one.losses}")
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    if {0: bench.start_loss} | {step: one.loss_at(step) for step in (3, STEPS)} != evaluated:
        found.append(f"held-out losses: {one.evaluations}, and not {evaluated}")
    assert one.held is not None
    if one.held.tensors:  # rank 0
        stored = load_file(run / f"checkpoint-{STEPS}" / "optimizer.safetensors")
        held = one.held.tensors
        found += [f"{name} is no state of both" for name in sorted(stored.keys() ^ held.keys())]
        found += [name for name in stored.keys() & held.keys() if not torch.equal(stored[name], held[name])]
        state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        if (state["optimizer_steps"], state["method"]) != (one.held.optimizer_steps, one.held.schedule):
            found.append(f"the method stands at {one.held.schedule} after {one.held.optimizer_steps} steps")
    return found


def searched(*arguments: object, status: int = 0) -> dict[str, Any]:
    """What `dist-subspace find-lr --json` prints."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        assert main(["find-lr", *map(str, arguments), "--json"]) == status, errors.getvalue()
    return json.loads(out.getvalue()) if out.getvalue() else {}


def refused(*arguments: object) -> str:
    """The one sentence of a search that is refused."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        assert main(["find-lr", *map(str, arguments)]) == 2, errors.getvalue()
    sentences = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and not out.getvalue(), errors.getvalue()
    return sentences[0].removeprefix("error: ")
