"""The names of everything in a run's folder, and the module that reads and writes each.

config.yaml                        the configuration, every key   saved_config.py, written by config.dump_config
metrics.jsonl                      a line a logged step           metrics.py, records.py
status.json                        what became of the run         status.py
.lock                              who is at work here            checkpoint/occupancy.py
checkpoint-<step>/                 a whole checkpoint             checkpoint/store.py
    MANIFEST.json                  size and sha256 of each file   manifest.py
    trainer_state.json             where the run stood            trainer_state.py
    optimizer.safetensors          masters and moments by name    checkpoint/state.py
    (the adapter's own files)                                     interchange/adapter.py
.checkpoint-<step>.<state>/        what a killed process left     checkpoint/store.py
set-aside-<step>-<time>/           another history                checkpoint/set_aside.py
adapter/                           the final adapter              training/results.py
    labels.json                    the classes' labels            training/results.py
factors/                           statistics of frozen matrices  statistics/cache.py
evaluations/<name>.json            what was measured              evaluation/results.py
tokens/                            tokenised samples              training/data/store.py
tensorboard/                       TensorBoard's events           training/tracked.py
trackers.json                      which runs of trackers it is   training/tracked.py
loss.png                           the loss curve                 report/curve.py
environment.json                   with what it was made          training/environment.py
samples.jsonl                      answers to run.sample_prompts  training/samples.py
profile/                           where the time went            training/profile.py
logs/rank-<rank>.log               what a failing rank said last  training/rank_logs.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dist_subspace.atomic_files import PARTIAL, REPLACED

REMOVED = "removed"  # beside PARTIAL and REPLACED: the state of a checkpoint that is being deleted

StrPath = str | os.PathLike[str]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HIDDEN_CHECKPOINT = re.compile(rf"\.checkpoint-(\d+)\.({PARTIAL}|{REPLACED}|{REMOVED})")


class RunFolder(os.PathLike[str]):
    """One run's folder, `run.output_dir`. Nothing need be there: each property is a path, and none is looked at."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def probe(self) -> Path:
        """A file that is written and deleted, to find out whether the folder can be written to."""
        return self.path / ".writable"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def factors(self) -> Path:
        return self.path / "factors"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        return self.path / checkpoint_name(step)

    def hidden_checkpoint(self, step: int, state: str) -> Path:
        """The folder of a checkpoint that has no name now; `state` is `PARTIAL`, `REPLACED` or `REMOVED`."""
        return self.path / f".checkpoint-{step}.{state}"

    def set_aside(self, step: int, time: str, number: int = 1) -> Path:
        """The folder for another history; `number` tells those of one second apart."""
        name = f"set-aside-{step}-{time}"
        return self.path / (name if number == 1 else f"{name}-{number}")

    def checkpoints(self) -> dict[int, Path]:
        """Every checkpoint folder by step, ascending, whole or not; also one that was set aside and not yet replaced."""
        folders: dict[int, Path] = {}
        for path in self._folders():
            if match := _HIDDEN_CHECKPOINT.fullmatch(path.name):
                if match[2] == REPLACED:
                    folders.setdefault(int(match[1]), path)
            elif match := _CHECKPOINT.fullmatch(path.name):
                folders[int(match[1])] = path
        return dict(sorted(folders.items()))

    def steps_with_leftovers(self) -> list[int]:
        """The steps whose checkpoints were being written, replaced or deleted when a process died, ascending."""
        matches = (_HIDDEN_CHECKPOINT.fullmatch(path.name) for path in self._folders())
        return sorted({int(match[1]) for match in matches if match})

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint lies in this run's folder."""
        return checkpoint.resolve().parent == self.path.resolve()

    def _folders(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []


class CheckpointFolder:
    """A checkpoint's folder, under its own name, a hidden one, or wherever somebody has copied it."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)

    @property
    def manifest(self) -> Path:
        return self.path / "MANIFEST.json"

    @property
    def trainer_state(self) -> Path:
        return self.path / "trainer_state.json"

    @property
    def optimizer(self) -> Path:
        return self.path / "optimizer.safetensors"

    @property
    def run(self) -> RunFolder:
        """The folder that it lies in, which is a run's unless somebody has copied the checkpoint."""
        return RunFolder(self.path.resolve().parent)

    @property
    def step(self) -> int | None:
        """The number in its name; None for a folder that is called otherwise."""
        match = _CHECKPOINT.fullmatch(self.path.name)
        return int(match[1]) if match else None


def checkpoint_name(step: int) -> str:
    """What the whole checkpoint of a step is called."""
    return f"checkpoint-{step}"


def adapter_labels(adapter: Path) -> Path:
    """The file for the labels of the classes in a final adapter."""
    return adapter / "labels.json"
