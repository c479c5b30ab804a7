"""A run under a real launcher, in a session of its own: watched, signalled, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from dist_subspace.run_folder.status import read_status
from tests.ranks import ROOT, free_port
from tests.tiny_run import make_model, make_records

TRAIN = str(ROOT / "launch" / "train.py")
_MARK = "DIST_SUBSPACE_TEST_RUN"  # in the environment of every process of a run
START = 300.0  # seconds until a run does what is waited for, on a busy machine


def command(name: str, ranks: int = 2) -> list[str]:
    """The launcher's command line up to the script."""
    port = ["--master_port", str(free_port())]
    if name == "deepspeed":
        return [sys.executable, str(Path(sys.executable).parent / name), "--num_accelerators", str(ranks), *port]
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *port]
    return [sys.executable]


def write_config(folder: Path, records: int = 400, **sections: dict[str, Any]) -> Path:
    """A model, records, and a configuration of long steps: 200 micro-batches of one sample each."""
    make_model(folder / "model")
    make_records(folder / "train.jsonl", records)
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "model", "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": "train.jsonl", "max_length": 48, "packing": False},
        "training": {
            "max_steps": 3,
            "global_batch_size": 200,
            "per_device_train_batch_size": 1,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
        },
        "run": {"output_dir": "run", "logging_steps": 1, "report_to": "none"},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


class Launched:
    """One launched run; `process` is the launcher."""

    def __init__(
        self, name: str, config: Path, *overrides: str, ranks: int = 2, script: Path | None = None, **environment: str
    ) -> None:
        self.run, self.log = config.parent / "run", config.parent / "output.log"
        surroundings = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.mark = surroundings[_MARK] = uuid.uuid4().hex
        surroundings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{surroundings.get('PATH', '')}"
        with self.log.open("wb") as output:
            self.process = psutil.Popen(
                [*command(name, ranks), str(script or TRAIN), str(config), *overrides],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=surroundings | environment,
                cwd=config.parent,
                start_new_session=True,
            )

    def ranks(self) -> list[psutil.Process]:
        """The processes that run the training script, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in sorted(self.all(), key=psutil.Process.create_time):
            with contextlib.suppress(psutil.Error):
                if TRAIN in process.cmdline()[:3] and "RANK" in process.environ():
                    found.setdefault(int(process.environ()["RANK"]), process)  # later ones were forked by the rank
        return [found[rank] for rank in sorted(found)]

    def all(self) -> list[psutil.Process]:
        """Every process of the run that lives: torchrun gives its ranks sessions of their own, an orphan has another parent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], object], timeout: float = START) -> None:
        """Wait until the condition holds; AssertionError with the run's output where it does not, or the run has ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()[-6000:]
            time.sleep(0.02)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.output()

    def ended(self, timeout: float) -> float:
        """Seconds until no process of the session is left; AssertionError after the timeout."""
        began = time.monotonic()
        while self.all() or self.process.poll() is None:
            assert time.monotonic() - began < timeout, self.output()[-6000:]
            time.sleep(0.05)
        return time.monotonic() - began

    def status(self) -> dict[str, Any]:
        found = read_status(self.run)
        assert found is not None, self.output()[-6000:]
        return found

    def losses(self) -> list[float]:
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    def end(self) -> None:
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def launched(
    name: str, config: Path, *overrides: str, ranks: int = 2, script: Path | None = None, **environment: str
) -> Iterator[Launched]:
    run = Launched(name, config, *overrides, ranks=ranks, script=script, **environment)
    try:
        yield run
    finally:
        run.end()
