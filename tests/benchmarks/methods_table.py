"""Every method trained on a real model and real data, in one process group, at ZeRO-3:

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 -m tests.benchmarks.methods_table [--steps 50] [--storages fp32 nf4 int8]

stories260K on openbookqa. A row a method and storage: trained parameters; training loss at the first step and over the last
five; ms of a step (global batch 8, optimizer included) and its ratio to LoRA's, the two engines' steps taken in turn on one
batch after the run, medians; checkpoint bytes (adapter, optimizer, state; RUN/factors apart); merge error
(largest |logit difference| between the adapted model and the merged checkpoint that transformers loads, float32, over the
largest logit); PEFT agreement (the same against PEFT's logits of the exported adapter on the same dense base; fp32 rows).
Needs DIST_SUBSPACE_DATA.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dist_subspace as dsub
from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import barrier, world
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.deepspeed.quiet import be_quiet
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.display import Display
from dist_subspace.training.observer import FinishedStep, Observer
from dist_subspace.training.plan import make_plan
from dist_subspace.training.trainer import Trainer

DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", "../shared/data"))
MODEL = DATA / "models/stories260K/hf"
FAST = 5e-2  # methods that train few numbers
RATES = dict.fromkeys(
    ("ssl", "ssb", "ia3", "bitfit", "sam-parser", "svdiff", "prefix", "prompt", "p-tuning", "vera"), FAST
)


class Recorder(Observer):
    """Keeps losses instead of showing them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Display(enabled=False, total_steps=0), None, None, device)
        self.losses: list[float] = []

    def step(self, finished: FinishedStep, logged: bool) -> None:
        self.losses.append(finished.loss)


def trained(folder: Path, method: str, storage: str, steps: int) -> tuple[Trainer, Recorder, Path]:
    """Collective: one run of the product's own loop."""
    section: dict[str, Any] = {"method": method}
    config = load_config(
        {
            "model": {"path": str(MODEL), "storage": storage, "dtype": "float32"},
            "subspace": section,
            "data": {
                "train": str(DATA / "instruct/openbookqa_train.json"),
                "max_length": 320,
                "packing": False,
                "cache_dir": str(folder / "tokens"),
            },
            "training": {
                "gradient_checkpointing": False,  # a third of the time, and no different result
                "max_steps": steps,
                "global_batch_size": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": RATES.get(method, 5e-3),
            },
            "deepspeed": {"preset": "zero3"},
            "run": {"output_dir": str(folder / f"{method}-{storage}"), "report_to": "none"},
        }
    )
    plan = make_plan(config, lambda sentence: None)
    recorder = Recorder(plan.device)
    trainer = Trainer(plan, recorder)
    trainer.run()
    return trainer, recorder, plan.run_dir.path


def step_seconds(trainer: Trainer, batch: Any) -> float:
    """Collective: a whole optimizer step."""
    barrier()
    began = time.perf_counter()
    trainer.stepper.accumulate(batch)
    trainer.engine.step(True)
    return time.perf_counter() - began


def beside(trainer: Trainer, lora: Trainer, rounds: int = 9) -> tuple[float, float]:
    """Collective: the median milliseconds of a step, and the median of its ratios to LoRA's, each pair taken at one time."""
    batch = trainer.plan.batches.batch(0)
    pairs = []
    for number in range(rounds + 1):
        sides = [trainer, lora] if number % 2 else [lora, trainer]
        seconds = [step_seconds(side, batch) for side in sides]
        pairs.append(seconds if number % 2 else seconds[::-1])
    warm = pairs[1:]
    return 1e3 * statistics.median(own for own, _ in warm), statistics.median(own / other for own, other in warm)


def logits(model: Callable[..., Any]) -> Tensor:
    ids = torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def off(actual: Tensor, wanted: Tensor) -> str:
    actual = actual[:, -wanted.shape[1] :]  # PEFT's virtual tokens have logits too, in front
    return f"{float((actual - wanted).abs().max() / wanted.abs().max()):.1e}"


def merge_error(model: nn.Module, wanted: Tensor, folder: Path) -> str:
    """Collective."""
    from transformers import AutoModelForCausalLM

    try:
        dsub.merge(model, folder, dtype="float32", report=None)
    except UsageError:
        return "-"
    return off(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()), wanted)


def peft_agreement(run: Path, wanted: Tensor, out: Path) -> str:
    """Collective: the final checkpoint's adapter as PEFT's files, read by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        dsub.export_peft(run, out)
    except UsageError:  # no exact form there
        return "-"
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return off(logits(PeftModel.from_pretrained(base, out).eval()), wanted)


def row(folder: Path, method: str, storage: str, steps: int, lora: Trainer) -> str:
    trainer, recorder, run = trained(folder, method, storage, steps)
    numel = sum(full_numel(p) for p in trainable_parameters(trainer.model))
    checkpoint = sum(f.stat().st_size for f in (run / f"checkpoint-{steps}").iterdir()) if world().is_main else 0
    trainer.engine.eval()
    wanted = logits(trainer.engine)
    merged = merge_error(trainer.model, wanted, folder / "merged")
    agrees = ""
    if storage == "fp32":
        agrees = peft_agreement(run / f"checkpoint-{steps}", wanted, folder / "peft")
    barrier()
    for name in ("merged", "peft"):
        if world().is_main:
            shutil.rmtree(folder / name, ignore_errors=True)
    trainer.engine.train()
    milliseconds, ratio = beside(trainer, lora)
    trainer.engine.deepspeed.destroy()
    last = sum(recorder.losses[-5:]) / 5
    text = f"{storage:<6}{method:<21}{numel:>9,}{recorder.losses[0]:>8.3f}{last:>8.3f}{milliseconds:>8.0f}{ratio:>7.2f}"
    return f"{text}{checkpoint:>12,}{merged:>9}{agrees:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--storages", nargs="*", default=["fp32", "nf4", "int8"])
    parser.add_argument("--only", nargs="*", default=list(dsub.methods()))
    arguments = parser.parse_args()
    be_quiet()
    ensure_process_group()
    shared = [tempfile.mkdtemp() if world().is_main else ""]
    torch.distributed.broadcast_object_list(shared, src=0)
    if world().is_main:
        print(f"{'':<6}{'method':<21}{'trained':>9}{'first':>8}{'last 5':>8}{'ms':>8}{'/LoRA':>7}", end="")
        print(f"{'checkpoint':>12}{'merge':>9}{'PEFT':>9}", flush=True)
    folder = Path(shared[0])
    for storage in arguments.storages:
        lora, _, _ = trained(folder / "beside", "lora", storage, 2)
        for method in arguments.only:
            try:
                text = row(folder, method, storage, arguments.steps, lora)
            except UsageError as refusal:
                text = f"{storage:<6}{method:<21}refused: {refusal}"
            if world().is_main:
                print(text, flush=True)
            gc.collect()
        lora.engine.deepspeed.destroy()


if __name__ == "__main__":
    main()
