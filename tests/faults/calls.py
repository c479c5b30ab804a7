"""Calls of the library that every rank makes, each with a fault of one rank: what each rank raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import dist_subspace as dsub
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.measuring import measure
from dist_subspace.evaluation.subject import Subject, find_subject
from dist_subspace.loading.load import download
from dist_subspace.placement.collectives import barrier, gather_objects, world
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.rate_search.asked import Asked as Search
from dist_subspace.rate_search.command import Told, _searched
from dist_subspace.talking.command import _generate
from dist_subspace.talking.options import Asked as Question
from dist_subspace.trainers.state import restore_schedule, restore_values, save_state
from dist_subspace.training.display import Display
from dist_subspace.training.last_words import Run
from tests.faults.agreements import Row
from tests.faults.injection import installed
from tests.tiny_models import tiny_model

_DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def make_calls(rows: Sequence[Row], home: str) -> None:
    """Writes a line for each row into `home/calls-RANK.jsonl`: kind and text of the error, and whether the ranks still agree."""
    ensure_process_group()
    torch.set_num_threads(1)
    calls = _calls(Path(home))
    with (Path(home) / f"calls-{world().rank}.jsonl").open("w", buffering=1) as answers:
        for row in rows:
            print(f"now: {row}", flush=True)
            kind, text = "none", ""
            try:
                with installed(row.fault) if row.rank == world().rank else nullcontext():
                    calls[row.scene]()
            except Exception as error:
                kind, text = type(error).__name__, str(error)
            whole = gather_objects(world().rank) == list(range(world().size))
            answers.write(json.dumps([kind, text, whole]) + "\n")


def _calls(home: Path) -> dict[str, Callable[[], Any]]:
    trained = _attached(home)
    dsub.save_adapter(trained, home / "saved")
    dsub.export_peft(trained, home / "peft", report=None)
    if world().is_main:
        _copy_of_the_base(home)
    barrier()
    numbers = iter(range(1000))
    thin = dsub.attach(dsub.load_frozen(home / "model", "fp32"), dsub.SubspaceConfig(rank=2, target_modules=["q_proj"]))
    dsub.save_adapter(thin, home / "thin")
    planned = _planned(home)
    return {
        "save_state": lambda: save_state(planned, home / "planned"),
        "restore_values": lambda: restore_values(planned, home / "planned"),
        "restore_schedule": lambda: restore_schedule(planned, home / "planned"),
        "combine": lambda: dsub.combine_adapters({home / "thin": 0.5}, home / f"out-{next(numbers)}"),
        "switch": lambda: dsub.switch_adapter(thin, home / "thin"),
        "generate": lambda: _generate(_question(home, next(numbers))),
        "load": lambda: _loaded(home),
        "download": lambda: download("nobody/nothing"),
        "load_adapter": lambda: dsub.load_adapter(_loaded(home), home / "saved"),
        "import_peft": lambda: dsub.import_peft(_loaded(home), home / "peft"),
        "save_adapter": lambda: dsub.save_adapter(trained, home / f"out-{next(numbers)}"),
        "merge": lambda: dsub.merge(trained, home / f"out-{next(numbers)}", report=None),
        "evaluate": lambda: _evaluated(home),
        "search": lambda: _searched(Run(), _search(home), Told(), Display(enabled=False, total_steps=0)),
        "export": lambda: dsub.export_peft(trained, home / f"out-{next(numbers)}", "lora", report=None),
        "export_experts": lambda: dsub.export_peft(_on_experts(), home / f"out-{next(numbers)}", report=None),
        "export_folder": lambda: dsub.export_peft(home / "saved", home / f"out-{next(numbers)}", report=None),
    }


def _question(home: Path, number: int) -> Question:
    named = {"input": str(home / "eval.jsonl"), "output": str(home / f"out-{number}.jsonl"), "format": "alpaca"}
    return Question(str(home / "thin"), **named, preset="zero0", generation={"max_new_tokens": 2})


def _subject(home: Path) -> Subject:
    settings = ["model.storage=fp32", "data.format=alpaca"]
    return find_subject(None, str(home / "model"), str(home / "eval.jsonl"), settings)


def _evaluated(home: Path) -> Any:
    subject = _subject(home)
    return measure(Asked(base=str(home / "model")), subject, Display(enabled=False, total_steps=0))


def _search(home: Path) -> Search:
    """Of two rates, for a step each."""
    config = {
        "model": {"path": str(home / "model"), "storage": "fp32"},
        "data": {
            "train": str(home / "train.jsonl"),
            "eval": str(home / "eval.jsonl"),
            "max_length": 48,
            "packing": False,
        },
        "training": {"global_batch_size": 2, "rank_timeout": None},
        "deepspeed": {"preset": "zero0"},
        "run": {"output_dir": str(home / "searched")},
    }
    return Search(config, rates=[1e-3, 1e-2], steps=1)


def _loaded(home: Path) -> Any:
    return dsub.load_frozen(home / "model", "fp32", deepspeed=_DEEPSPEED)


def _attached(home: Path) -> Any:
    """Split over the ranks, and with frozen factors that its adapter is not complete without."""
    return dsub.attach(_loaded(home), dsub.SubspaceConfig(method="pissa", rank=2, target_modules=["q_proj"]))


def _planned(home: Path) -> Any:
    """With a schedule, and a Trainer's checkpoint of it in `home/planned`."""
    config = dsub.SubspaceConfig(method="adalora", rank=2, target_modules=["q_proj"])
    model = dsub.attach(dsub.load_frozen(home / "model", "fp32"), config)
    dsub.save_adapter(model, home / "planned")
    save_state(model, home / "planned")
    return model


def _on_experts() -> Any:
    mixture = tiny_model("MixtralForCausalLM", config_name="MixtralConfig", num_local_experts=4, num_experts_per_tok=2)
    names = ["experts.down_proj"]
    return dsub.attach(mixture, dsub.SubspaceConfig(rank=2, target_parameters=names, expert_parameters="shared"))


def _copy_of_the_base(home: Path) -> None:
    """What PEFT writes beside an adapter "to be safe"."""
    tensors = load_file(home / "peft" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = load_file(home / "model" / "model.safetensors")["lm_head.weight"]
    save_file(tensors, home / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
