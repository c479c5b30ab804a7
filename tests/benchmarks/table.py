"""Every storage x ZeRO stage x method on a real model and real data, in one process group:

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 -m tests.benchmarks.table [steps]

Prints a row a cell: first and last loss, frozen bytes on a rank after a step and at the peak inside one, optimizer bytes
over all ranks, checkpoint bytes. Needs DIST_SUBSPACE_DATA.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dist_subspace.config import load_config
from dist_subspace.placement.collectives import max_over_ranks, sum_over_ranks, world
from dist_subspace.placement.deepspeed.optimizer_state import plain_optimizer
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.deepspeed.quiet import be_quiet
from dist_subspace.placement.tensors import resident_bytes
from dist_subspace.storage import FrozenLinear, storages
from dist_subspace.subspace import methods, trainable_parameters
from dist_subspace.training.display import Display
from dist_subspace.training.observer import FinishedStep, Observer
from dist_subspace.training.plan import make_plan
from dist_subspace.training.trainer import Trainer

DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", "../shared/data"))
RATES = {"lora": 5e-3, "ssl": 5e-2, "ssb": 5e-2}


@dataclass
class Cell:
    """What one run of a few steps came to; bytes are the largest rank's, optimizer bytes the sum over ranks."""

    first: float
    last: float
    after: int
    peak: int
    optimizer: int
    trainable: int
    checkpoint: int

    def row(self) -> str:
        return (
            f"{self.first:>8.4f}{self.last:>8.4f}{self.after:>12,}{self.peak:>12,}{self.optimizer:>11,}"
            f"{self.trainable:>10,}{self.checkpoint:>12,}"
        )


class Recorder(Observer):
    """Keeps the losses instead of showing them."""

    def __init__(self, display: Display, device: torch.device) -> None:
        super().__init__(display, None, None, device)
        self.losses: list[float] = []

    def step(self, finished: FinishedStep, logged: bool) -> None:
        self.losses.append(finished.loss)


def watch_peak(model: nn.Module) -> list[int]:
    """The most frozen bytes that lay on this rank whenever a frozen product ran, forward or backward."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    peak = [0]

    def measured(product):  # type: ignore[no-untyped-def]
        def run(x: torch.Tensor) -> torch.Tensor:
            peak[0] = max(peak[0], resident_bytes(frozen))
            return product(x)

        return run

    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.product = measured(module.product)  # type: ignore[method-assign]
            module.transposed_product = measured(module.transposed_product)  # type: ignore[method-assign]
    return peak


def run_cell(folder: Path, storage: str, stage: int, method: str, steps: int) -> Cell:
    config = load_config(
        {
            "model": {"path": str(DATA / "models/stories260K/hf"), "storage": storage},
            "subspace": {"method": method},
            "data": {
                "train": str(DATA / "instruct/openbookqa_train.json"),
                "max_length": 320,
                "packing": False,
                "cache_dir": str(folder / "tokens"),
            },
            "training": {
                "max_steps": steps,
                "global_batch_size": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": RATES[method],
            },
            "deepspeed": {"preset": f"zero{stage}"},
            "run": {"output_dir": str(folder / f"{storage}-{stage}-{method}"), "report_to": "none"},
        }
    )
    display = Display(enabled=False, total_steps=0)
    plan = make_plan(config, display.notice)
    recorder = Recorder(display, plan.device)
    trainer = Trainer(plan, recorder)
    peak = watch_peak(trainer.model)
    trainer.run()
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    return Cell(
        first=recorder.losses[0],
        last=recorder.losses[-1],
        after=int(max_over_ranks(resident_bytes(frozen))),
        peak=int(max_over_ranks(peak[0])),
        optimizer=int(sum_over_ranks([float(optimizer_bytes(trainer))])[0]),
        trainable=sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in trainable_parameters(trainer.model)),
        checkpoint=sum(f.stat().st_size for f in plan.run_dir.checkpoint(steps).iterdir()),
    )


def optimizer_bytes(trainer: Trainer) -> int:
    """Master copies that are not the parameters themselves, and moments, on this rank; step counters apart."""
    optimizer = plain_optimizer(trainer.engine.deepspeed)
    own = {id(p) for p in trainer.model.parameters()}
    masters = [p for p in optimizer.state if id(p) not in own]
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    return sum(t.numel() * t.element_size() for t in [*masters, *moments])


def main() -> None:
    be_quiet()
    torch.manual_seed(0)
    ensure_process_group()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    shared = [tempfile.mkdtemp() if world().is_main else ""]
    torch.distributed.broadcast_object_list(shared, src=0)
    if world().is_main:
        print(f"{world().size} ranks, {steps} steps, stories260K on openbookqa; bytes of frozen weights on a rank")
        print(
            f"{'storage':<8}{'ZeRO':<5}{'method':<7}{'first':>8}{'last':>8}{'after step':>12}{'peak':>12}"
            f"{'optimizer':>11}{'trained':>10}{'checkpoint':>12}"
        )
    for storage in storages():
        for stage in range(4):
            for method in (name for name in methods() if name in RATES):
                cell = run_cell(Path(shared[0]), storage, stage, method, steps)
                if world().is_main:
                    print(f"{storage:<8}{stage:<5}{method:<7}{cell.row()}", flush=True)


if __name__ == "__main__":
    main()
