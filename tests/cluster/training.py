"""A recipe of seconds, and what a run of it on some hosts left behind."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import Host
from tests.ranks import ROOT
from tests.tiny_run import make_model, make_records

STEPS = 4
RUN_TIMEOUT = 300.0
# What a person has set in the shell from which a run is started.
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DIST_SUBSPACE_PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TMPDIR": "/mnt",
}


@dataclass(frozen=True)
class Result:
    """The losses of all steps, and the adapter's bytes as a hash."""

    losses: tuple[float, ...]
    adapter: str
    state: str


class Recipe:
    """A configuration whose global batch goes on 1, 2, 3 and 4 ranks."""

    def __init__(self, folder: Path, single: Host) -> None:
        self.folder, self._single = folder, single
        self._alone: dict[tuple[int, tuple[str, ...]], Result] = {}
        folder.mkdir(parents=True)
        make_model(folder / "model")
        make_records(folder / "train.jsonl", 60)
        self.config = folder / "config.yaml"
        values: dict[str, Any] = {
            "model": {"path": str(folder / "model"), "storage": "nf4"},
            "subspace": {"method": "lora", "rank": 4},
            "data": {"train": str(folder / "train.jsonl"), "max_length": 64},
            "training": {
                "max_steps": STEPS,
                "global_batch_size": 12,
                "per_device_train_batch_size": 1,
                "learning_rate": 0.01,
            },
            "deepspeed": {"preset": "zero3"},
            "run": {"output_dir": str(folder / "run"), "logging_steps": 1, "report_to": []},
        }
        self.config.write_text(yaml.safe_dump(values))

    def alone(self, ranks: int, *changes: str) -> Result:
        """The result of as many ranks on one host, started by torchrun."""
        key = (ranks, changes)
        if key not in self._alone:
            run = self.folder / f"alone-{len(self._alone)}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            done = self._single.run([*command, *self.train(run, *changes)], RUN_TIMEOUT, ENVIRONMENT)
            assert done.returncode == 0, done.stdout + done.stderr
            self._alone[key] = result(run)
        return self._alone[key]

    def train(self, run: Path, *changes: str) -> list[str]:
        """What a launcher starts."""
        return [str(ROOT / "launch" / "train.py"), *self.arguments(run, *changes)]

    def arguments(self, run: Path, *changes: str) -> list[str]:
        return [str(self.config), f"run.output_dir={run}", *changes]


def result(run: Path) -> Result:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    adapter = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    state = json.loads((run / "status.json").read_text())["state"]
    return Result(tuple(losses[step] for step in sorted(losses)), adapter, state)
