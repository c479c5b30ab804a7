"""What one rank alone sees, or does: another disk, another clock, a signal, a model of its own that misbehaves there."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_subspace.placement import shared_folders
from tests.faults.scenes import Home

_OWN = '''
import os

from transformers import LlamaForCausalLM


class OwnForCausalLM(LlamaForCausalLM):
    """Misbehaves in the second micro-batch that is trained, in a process whose environment says how."""

    trained = 0

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        self.trained += self.training
        how = os.environ.get("OWN_FAULT") if self.training and self.trained == 2 else None
        if how == "infinite gradient":
            hook = self.model.norm.register_forward_hook(_broken)
        found = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        if how == "raise":
            raise RuntimeError("this model's own fault")
        if how == "nan":
            found.logits = found.logits * float("nan")
        if how == "infinite gradient":
            hook.remove()
        return found


def _broken(norm, args, output):
    output.register_hook(lambda gradient: gradient * float("inf"))
'''


def own_model(folder: Path) -> None:
    """The model in the folder gets a class of its user's."""
    import json

    described = json.loads((folder / "config.json").read_text())
    described |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "own.py").write_text(_OWN)


def another_disk(home: Home, name: str) -> Path:
    """A folder with copies of what a run reads, as another node has them."""
    folder = home.folder / name
    folder.mkdir()
    for part in ("model", "train.jsonl", "eval.jsonl", "config.yaml"):
        copy = shutil.copytree if (home.folder / part).is_dir() else shutil.copy
        copy(home.folder / part, folder / part)
    return folder


# What a rank is before its run begins.


def misbehaves(how: str) -> None:
    os.environ["OWN_FAULT"] = how


def is_elsewhere(folder: str, first_of_its_node: bool = True) -> None:
    shared_folders.PATIENCE = 0.3  # no network file system shows anything here late
    os.chdir(folder)
    if first_of_its_node:
        os.environ["LOCAL_RANK"] = "0"


def lacks(package: str) -> None:
    sys.modules[package] = None  # type: ignore[assignment]  # Python's word for "not to be had"


def is_told_to_stop(after: str) -> None:
    once_there(Path(after), lambda: os.kill(os.getpid(), signal.SIGTERM))


def is_stopped_after(after: str) -> None:
    """For good: whoever waits for this rank waits for ever."""
    once_there(Path(after), lambda: os.kill(os.getpid(), signal.SIGSTOP))


def has_a_clock_that_runs_ahead(after: str) -> None:
    true = time.monotonic

    def jump() -> None:
        time.monotonic = lambda: true() + 100_000.0

    once_there(Path(after), jump)


def has_a_full_screen(after: str) -> None:
    """Standard output is a file on a disk that is full by then."""
    once_there(Path(after), lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1))


def works_for_hours() -> None:
    """From its second step on; the time that it is given to leave is shortened."""
    from dist_subspace.placement import peers
    from dist_subspace.training.engine import Stepper

    peers._LEAVING, accumulate, steps = 1.0, Stepper.accumulate, []

    def slow(*args: Any) -> Any:
        steps.append(1)
        time.sleep(3600 if len(steps) == 2 else 0)
        return accumulate(*args)

    Stepper.accumulate = slow  # type: ignore[method-assign]


def once_there(file: Path, act: Callable[[], object]) -> None:
    def watch() -> None:
        while not file.exists() or not file.read_text():
            time.sleep(0.05)
        act()

    threading.Thread(target=watch, daemon=True).start()


def fetches_where_one_rank_has_it(folders: list[str]) -> None:
    """`download` of a name that is a folder for one rank alone."""
    from dist_subspace.errors import UsageError
    from dist_subspace.loading.load import download
    from dist_subspace.placement.collectives import gather_objects, world
    from dist_subspace.placement.deepspeed.process_group import ensure_process_group

    ensure_process_group()
    os.chdir(folders[world().rank])
    try:
        download("own/model")
    except UsageError as error:
        print(f"error: {error}")
    assert gather_objects(world().rank) == [0, 1]
