"""Step times side by side in one process: LoRA against PEFT's LoRA, SSL and SSB against the frozen model.

    python -m tests.benchmarks.speed [--device cuda] [--threads 2] [--rounds 15] [--clock wall] [--only lora-bf16 ssl-nf4 ...]

The model is a random LLaMA in bfloat16. A step is forward, loss and backward, without an optimizer, without activation
checkpointing. The two sides of a comparison alternate (A B B A A B ...), each round gives one ratio, and the median and
quartiles of the ratios are printed: a machine that is busy slows both sides of a round alike. Before anything is timed,
both sides must give the same loss and the same gradients.

PEFT keeps its adapters in float32 beside a bfloat16 base (its default), or in the base's type (`autocast_adapter_dtype`
off); ours are float32 and multiply in the base's type. Both of PEFT's ways are timed.

On a machine that others use, `--clock cpu --threads 1` counts the processor time of this process alone: what the step
costs, not how long it waited. Threads that wait for each other should sleep then (OMP_WAIT_POLICY=passive).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from tests.benchmarks import speed_models as models

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: milliseconds of each side, ratio (ours over theirs) with its quartiles."""

    name: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float
    target: float


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def time_once(step: Step, clock: Callable[[], float]) -> float:
    """Seconds of one step."""
    start = clock()
    step()
    if models.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(name: str, ours: Step, theirs: Step, rounds: int, target: float, clock: Callable[[], float]) -> Result:
    """Alternate the two sides; who goes first alternates too."""
    for step in (ours, theirs, ours, theirs):
        step()
    mine, other = [], []
    for index in range(rounds):
        if index % 2:
            other.append(time_once(theirs, clock))
            mine.append(time_once(ours, clock))
        else:
            mine.append(time_once(ours, clock))
            other.append(time_once(theirs, clock))
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return Result(name, 1e3 * statistics.median(mine), 1e3 * statistics.median(other), middle, low, high, target)


def cases() -> dict[str, tuple[Callable[[], tuple[Step, Step]], float]]:
    """Name -> (what makes the two checked steps, target ratio)."""
    found: dict[str, tuple[Callable[[], tuple[Step, Step]], float]] = {}
    for storage in ("bf16", "nf4", "int8"):
        target = 0.9 if storage == "int8" else 0.85
        found[f"lora-{storage}"] = (partial(models.lora_against_peft, storage, True), target)
        found[f"lora-{storage}-peft16"] = (partial(models.lora_against_peft, storage, False), target)
        found[f"ssl-{storage}"] = (partial(models.method_against_frozen, "ssl", storage), 1.05)
        found[f"ssb-{storage}"] = (partial(models.method_against_frozen, "ssb", storage), 1.10)
        found[f"none-{storage}"] = (partial(models.frozen_against_frozen, storage), 1.0)
    return found


def show(result: Result) -> None:
    print(
        f"{result.name:18s} ours {result.ours_ms:8.1f} ms   theirs {result.theirs_ms:8.1f} ms   "
        f"ratio {result.ratio:.3f} [{result.low:.3f}, {result.high:.3f}]   target {result.target:.2f}",
        flush=True,
    )


def main() -> None:
    known = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="cuda: a step ends when the device has finished it")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--only", nargs="*", choices=sorted(known), default=list(known))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models.DEVICE = torch.device(arguments.device)
    for name in arguments.only:
        make, target = known[name]
        ours, theirs = make()
        gc.collect()
        gc.disable()
        load = os.getloadavg()[0]
        if load > 1.5:
            print(f"warning: the machine is busy (load {load:.1f}); ratios spread more than usual")
        show(compare(name, ours, theirs, arguments.rounds, target, CLOCKS[arguments.clock]))
        gc.enable()
        del ours, theirs


if __name__ == "__main__":
    main()
