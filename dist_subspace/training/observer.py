"""What a person and a file see of a run. Rank 0 shows and writes; the other ranks only take part in what is agreed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_subspace.accounting import summary
from dist_subspace.placement.collectives import max_over_ranks, world
from dist_subspace.report.quantities import bytes_text
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.metrics import MetricsWriter
from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.training.announce import SILENCE
from dist_subspace.training.display import Display
from dist_subspace.training.memory import peak_memory
from dist_subspace.training.preferences.rewards import NONE, RewardSums
from dist_subspace.training.profile import Profile
from dist_subspace.training.samples import Sample, write_samples

if TYPE_CHECKING:
    from dist_subspace.training.trackers import Trackers


@dataclass(frozen=True)
class FinishedStep:
    """One optimizer step. step, epoch, samples, tokens, elapsed_seconds: of the whole run so far; the rest is the step's own.

    grad_norm: before clipping, None where it is not known. penalty: of the method's constraint, where it has one; it is no part
    of `loss`. rewards: the sums behind the figures of preferences.
    """

    step: int
    epoch: float
    samples: int
    tokens: int
    elapsed_seconds: float
    loss: float
    penalty: float | None
    learning_rate: float
    grad_norm: float | None
    own_tokens: int
    own_seconds: float
    rewards: RewardSums = NONE


class Observer:
    """Display, metrics.jsonl and trackers, fed with the same records."""

    def __init__(
        self, display: Display, metrics: MetricsWriter | None, trackers: Trackers | None, device: torch.device
    ):
        self.display, self.metrics, self.trackers, self.device = display, metrics, trackers, device
        self.profile: Profile | None = None
        self.run_dir: RunFolder | None = None
        self._unlogged: list[FinishedStep] = []
        # Told the number of each step that is made, and where the run stands then, by name.
        self.reached: Callable[[int, Mapping[str, Any]], None] = lambda step, facts: None

    def start(self, step: int) -> None:
        self.display.start(step)

    def notice(self, text: str) -> None:
        self.display.notice(text)

    def warning(self, text: str) -> None:
        self.display.warning(text)

    def model_ready(self, model: nn.Module) -> None:
        sizes = summary(model)
        rows = [(row.name, row.trainable, row.frozen, row.bytes_on_rank) for row in sizes.rows]
        self.display.show_summary(rows, title=f"method {sizes.method}")

    def step(self, finished: FinishedStep, logged: bool) -> None:
        """Collective where `logged`. The loss that is logged is the mean over the steps since the last logged one, the
        speed that over their time."""
        self._unlogged.append(finished)
        self.display.advance(finished.step, finished.loss)
        self.reached(finished.step, self._where(finished))
        if self.profile is not None:
            with self.aside("profile"):
                self.profile.step()
        if logged:
            self.log()

    def log(self) -> None:
        """Collective: a line for the steps since the last logged one; nothing where there is none."""
        if not self._unlogged:
            return
        record = _record(self._unlogged, int(max_over_ranks(peak_memory(self.device))))
        self._unlogged = []
        if world().is_main:
            self._write(record)
            self.display.update(record)

    def _where(self, finished: FinishedStep) -> dict[str, Any]:
        total, left = self.display.total_steps, self.display.pace.seconds
        loss = finished.loss if math.isfinite(finished.loss) else None
        seconds = round(left, 1) if math.isfinite(left) else None
        return {"total_steps": total, "epoch": round(finished.epoch, 4), "loss": loss, "seconds_left": seconds}

    @contextmanager
    def during(self, what: str, rounds: int) -> Iterator[None]:
        """What goes on within a step or beside it; `moved` counts its rounds."""
        with self.display.during(what, rounds):
            yield

    def moved(self) -> None:
        self.display.moved()

    @property
    def patience(self) -> float:
        """Seconds until what goes on within `during` is said: a live line shows it anyway."""
        return math.inf if self.display.is_live else SILENCE

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """What takes time beside the steps, for the time that is left."""
        with self.display.pace.aside(kind):
            yield

    def evaluation(self, evaluation: Evaluation, remark: str = "") -> None:
        if world().is_main:
            self._write(evaluation)
            self.display.evaluation(evaluation, remark)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Answers to prompts: on the screen, in RUN/samples.jsonl and in the trackers."""
        if not world().is_main:
            return
        for sample in samples:
            self.display.notice(f"sample at step {sample.step} | {sample.prompt!r} -> {sample.answer!r}")
        if self.run_dir is not None:
            write_samples(self.run_dir, list(samples))
        if self.trackers is not None:
            self.trackers.samples(samples)

    def _write(self, record: StepRecord | Evaluation) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
        if self.trackers is not None:
            self.trackers.log(record)

    def sync(self) -> None:
        """Local: what was recorded so far is on disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def saved(self, folder: Path) -> None:
        self.display.notice(f"saved {folder}")

    @contextmanager
    def loading(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar for the load, in bytes."""
        with self.display.loading(what, bytes_text) as advance:
            yield advance

    @contextmanager
    def statistics(self, kind: str) -> Iterator[Callable[[int, int], None] | None]:
        """A progress bar for the decompositions of the frozen matrices, where the method has any."""
        if kind == "none":
            yield None
            return
        with self.display.loading(f"{kind} of the frozen matrices") as advance:
            yield advance

    def close(self) -> None:
        if self.profile is not None:
            self.profile.close()
        self.display.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close()


def _record(steps: Sequence[FinishedStep], peak_memory_bytes: int) -> StepRecord:
    """The line for the last of these steps, with their mean loss and their speed."""
    last = steps[-1]
    return StepRecord(
        step=last.step,
        epoch=last.epoch,
        samples=last.samples,
        tokens=last.tokens,
        loss=sum(step.loss for step in steps) / len(steps),
        learning_rate=last.learning_rate,
        grad_norm=last.grad_norm,
        tokens_per_second=sum(step.own_tokens for step in steps) / max(sum(step.own_seconds for step in steps), 1e-9),
        peak_memory_bytes=peak_memory_bytes,
        elapsed_seconds=last.elapsed_seconds,
        penalty=last.penalty,
        figures=RewardSums.summed(step.rewards for step in steps).figures(),
    )
