"""The product, run in this process on a tiny model, and what it left: lines, files, and every call of the model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.config import PeftConfigMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from dist_subspace.run_folder.status import EXIT_OK, read_status
from dist_subspace.training.run import train
from tests.keys.watch import Call, Watched, watched
from tests.tiny_run import make_model

UNSET = object()  # as a changed value: the key is left out
RECORDS, HELD_OUT = 22, 7


@dataclass
class Outcome:
    """A run that is over. seen: what it did with the model. said: what was printed."""

    folder: Path
    status: int
    seen: Watched
    said: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> Outcome:
        """Of a run that others have made: what it left."""
        return cls(Path(config["run"]["output_dir"]), EXIT_OK, Watched(), "")

    @property
    def calls(self) -> list[Call]:
        """Of the model, in their order."""
        return self.seen.calls

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "eval_loss" in line]

    @property
    def trained_on(self) -> list[list[int]]:
        """The rows of all micro-batches in their order: the order of the samples, which a reference takes over."""
        return [row for call in self.calls if call.trains for row in call.rows]

    @property
    def evaluated_on(self) -> list[list[int]]:
        """The rows of all evaluations; behind them those on which the end of a run is measured."""
        return [row for call in self.calls if not call.training for row in call.rows]

    @property
    def adapter(self) -> dict[str, Tensor]:
        return dict(load_file(self.folder / "adapter" / "adapter_model.safetensors"))

    @property
    def config(self) -> dict[str, Any]:
        return dict(yaml.safe_load((self.folder / "config.yaml").read_text()))

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.partition("-")[2]) for path in self.folder.glob("checkpoint-*"))

    @property
    def message(self) -> str:
        """What RUN/status.json says."""
        return str((read_status(self.folder) or {}).get("message"))


class Bench:
    """A model, its data, and an adapter of PEFT's that every run begins with, so that a reference can begin there too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model")
        texts = [f"{'abcdefghijklmnopqrstuvwxyz'[n]} says {n * n} " + "so " * (n % 4) for n in range(RECORDS)]
        self.data = self.write("train.jsonl", [{"text": text} for text in texts])
        self.held_out = self.write(
            "eval.jsonl", [{"text": f"{n} and {'again ' * (n % 3)}{n}"} for n in range(HELD_OUT)]
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        end = [self.tokenizer.eos_token_id]
        self.samples: list[list[int]] = [[*self.tokenizer(t, add_special_tokens=False).input_ids, *end] for t in texts]
        self.peft_model(save=True)
        self._count = 0
        self._kept: dict[str, Outcome] = {}

    def write(self, name: str, records: list[dict[str, Any]]) -> str:
        (self.folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(self.folder / name)

    def base_model(self, folder: Path | None = None) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder or self.folder / "model", dtype=torch.float32)

    def save_model(self, model: PreTrainedModel, folder: Path) -> Path:
        """Another base, with the same tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def token(self, text: str) -> int:
        """The id of a text of one token."""
        (number,) = self.tokenizer(text, add_special_tokens=False).input_ids
        return int(number)

    def peft_model(
        self, config: PeftConfigMixin | None = None, save: bool = False, base: Path | None = None
    ) -> nn.Module:
        """PEFT's model at the values that a run begins with: LoRA, and the norms in full, which are one-dimensional.

        A reference that needs another adapter gives its own configuration, saves it under `start`, and lets the run begin there
        (`subspace.init_from`).
        """
        usual = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm"]
        )
        usual.task_type = "CAUSAL_LM"
        torch.manual_seed(5)
        model = get_peft_model(self.base_model(base), config or usual)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))  # B too, so that all of it has a gradient
        if save:
            model.save_pretrained(self.folder / "start")
        return model

    def configuration(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Six steps of two micro-batches of two samples, without anything that a key could turn on; and the changes."""
        self._count += 1
        tree: dict[str, Any] = {
            "model": {"path": str(self.folder / "model"), "storage": "fp32"},
            "subspace": {"init_from": str(self.folder / "start")},
            "data": {
                "train": self.data,
                "format": "text",
                "max_length": 64,
                "packing": False,
                "cache_dir": str(self.folder / "tokens"),
            },
            "training": {
                "max_steps": 6,
                "global_batch_size": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 0.01,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "max_grad_norm": 0,
                "gradient_checkpointing": False,
            },
            "deepspeed": {"preset": "zero0"},
            "checkpoint": {"save_steps": 1000},
            "run": {
                "output_dir": str(self.folder / f"run-{self._count}"),
                "logging_steps": 1,
                "eval_steps": None,
                "report_to": "none",
            },
        }
        for name, value in changes.items():
            section, *inner, key = name.split(".")
            node = tree[section]
            for part in inner:
                node = node.setdefault(part, {})
            node.pop(key, None)
            if value is not UNSET:
                node[key] = copy.deepcopy(value)
        return tree

    def run(self, changes: Mapping[str, Any] | None = None, expect: int = EXIT_OK) -> Outcome:
        """The base configuration with the changes (dotted key -> value), run to its end."""
        return self.go(self.configuration(changes or {}), expect)

    def go(self, config: dict[str, Any], expect: int = EXIT_OK) -> Outcome:
        return run_here(config, expect)

    def usual(self, **changes: Any) -> Outcome:
        """The unchanged run, made once; `changes` (section__key) for another one that several rows share."""
        name = json.dumps(changes, sort_keys=True)
        if name not in self._kept:
            self._kept[name] = self.run({key.replace("__", "."): value for key, value in changes.items()})
        return self._kept[name]


def run_here(config: dict[str, Any], expect: int = EXIT_OK) -> Outcome:
    with watched() as seen, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = train(config)
    folder = Path(config["run"]["output_dir"])
    assert status == expect, out.getvalue()[-3000:]
    return Outcome(folder, status, seen, out.getvalue())
