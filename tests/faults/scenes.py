"""What the agreement tests run: tiny runs that have begun already, and calls of the library on every rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.forked_ranks import Ended, report, run_script
from tests.tiny_run import make_model, make_records

_EVALUATED = ("data.eval=eval.jsonl", "run.eval_steps=1", "checkpoint.save_total_limit=1")
# scene -> overrides, and the run that it goes on with.
SCENES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "plain": (_EVALUATED, None),
    "zero3": (("deepspeed.preset=zero3",), None),
    "packed": (("data.packing=true", "training.global_batch_size=2"), None),
    "pissa": (("subspace.method=pissa",), None),
    "pissa-again": (("subspace.method=pissa",), "pissa"),
    "begun": (("subspace.method=pissa", "subspace.init_from=runs/pissa/adapter"), None),
    "frozen": (("subspace.method=lora-fa",), "lora-fa"),
    "dash": (("subspace.method=lora-dash", "subspace.options.warmup_steps=1"), None),
    "dash-again": (("subspace.method=lora-dash", "subspace.options.warmup_steps=1"), "lora-dash"),
    "adalora": (
        ("subspace.method=adalora", *(f"subspace.options.{key}=0" for key in ("warmup_steps", "final_steps"))),
        None,
    ),
    "own": (("model.path=own", "model.trust_remote_code=true", "training.max_steps=2"), None),
    "long": (("training.max_steps=2000", "training.lr_scheduler_type=constant", "training.max_time=3600"), None),
    "fresh": (("data.cache_dir=null",), None),
    "diverged": (("model.path=broken",), None),
}


class Home:
    """A folder with models, records and runs of one step of two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model", layers=1)
        make_model(folder / "broken", layers=1)
        _break(folder / "broken" / "model.safetensors")
        make_records(folder / "train.jsonl", 20)
        make_records(folder / "eval.jsonl", 5)
        values: dict[str, dict[str, Any]] = {
            "model": {"path": "model", "storage": "fp32"},
            "subspace": {"method": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]},
            "data": {"train": "train.jsonl", "max_length": 48, "packing": False, "cache_dir": "tokens"},
            "training": {
                "max_steps": 2,
                "global_batch_size": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 0.01,
                "gradient_checkpointing": False,
            },
            "deepspeed": {"preset": "zero0"},
            "checkpoint": {"save_steps": 1},
            "run": {"logging_steps": 1, "report_to": "none", "local_dir": "local"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        self._begun: set[str] = set()

    def run(self, scene: str, run: str, *overrides: str, ranks: int = 2, **how: Any) -> list[Ended]:
        """The scene on every rank; `run` is the folder of the run."""
        given, begun = SCENES[scene]
        for method in filter(None, [begun, "pissa" if scene == "begun" else None]):
            self._begin(method)
        if begun is not None and not (self.folder / run).exists():
            self.copy(begun, run)
        arguments = ["config.yaml", f"run.output_dir={run}", *given, *overrides]
        return run_script(ranks, arguments, self.folder, **how)

    def copy(self, method: str, run: str) -> None:
        """The run of a method as it was after its first step."""
        self._begin(method)
        shutil.copytree(self.folder / "runs" / method, self.folder / run)
        for left in ("checkpoint-2", "adapter"):
            shutil.rmtree(self.folder / run / left)

    def _begin(self, method: str) -> None:
        if method in self._begun:
            return
        scene = {"lora-fa": "frozen", "lora-dash": "dash", "pissa": "pissa", "lora": "plain"}[method]
        arguments = ["config.yaml", f"run.output_dir=runs/{method}", *SCENES[scene][0]]
        ended = run_script(2, arguments, self.folder)
        assert [rank.status for rank in ended] == [0, 0], report(ended)
        self._begun.add(method)


def _break(file: Path) -> None:
    """A model that computes no numbers."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights["lm_head.weight"][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
