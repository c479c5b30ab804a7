"""The model of a run, loaded once, and trained from one start at one rate after another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_subspace.placement.collectives import max_over_ranks
from dist_subspace.rate_search.held import Held, hold, put_back, without_steps
from dist_subspace.run_folder.records import Evaluation
from dist_subspace.stopping import STOP, Interrupted
from dist_subspace.subspace import parameter_groups
from dist_subspace.training.display import Display
from dist_subspace.training.observer import FinishedStep, Observer
from dist_subspace.training.plan import Plan
from dist_subspace.training.progress import Progress
from dist_subspace.training.schedule import schedule_of
from dist_subspace.training.trainer import Trainer

RECENT = 5  # steps whose mean training loss says where a rate stands
# A rate is given up where that mean is above twice the loss before training, and by more than one nat.
FACTOR, NATS = 2.0, 1.0


@dataclass
class Tried:
    """One rate. losses: of each of its steps; evaluations: held-out figures by the step after which they were measured; stopped:
    why it did not go on, None while it may; diverged: whether that was why."""

    rate: float
    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    stopped: str | None = None
    diverged: bool = False
    progress: Progress = field(default_factory=Progress)
    held: Held | None = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float | None:
        """The mean training loss of its last steps; None before the first."""
        return statistics.fmean(self.losses[-RECENT:]) if self.losses else None

    def loss_at(self, step: int) -> float:
        """The held-out loss after so many steps; infinite where it was not measured, or is no number."""
        loss = self.evaluations.get(step, {}).get("eval_loss", math.inf)
        return loss if math.isfinite(loss) else math.inf


class Bench(Trainer):
    """A run's own loop, data and engine, without its folder. Every method is collective."""

    def __init__(self, plan: Plan, observer: Observer) -> None:
        """Raises Interrupted where this process is told to stop."""
        super().__init__(plan, observer)
        self.listener = Listener(plan)
        self.observer = self.listener  # a step says nothing from here on
        self._savable = True  # its state is read at once
        self._groups = self.engine.rates
        self.first = self._first_state()
        self.seconds = self._seconds_of_a_step()
        began = time.monotonic()
        self.begun_at = self.evaluated()
        self.evaluation_seconds = max_over_ranks(time.monotonic() - began)

    @property
    def start_loss(self) -> float:
        """The held-out loss before training."""
        return self.begun_at["eval_loss"]

    def train(self, tried: Tried, steps: int) -> None:
        """Let the rate go on until it has made so many steps, and measure it then; it may be given up on the way.

        Raises:
            Interrupted: on every rank, where one was told to stop.
        """
        held, training = tried.held or self.first, self.config.training
        put_back(held, self.engine, self.model, tried.steps, self.plan.total_steps)
        self.progress, self.losses = tried.progress, tried.losses
        rates = self._rates(tried.rate)
        self.schedule = schedule_of(training, self.plan.total_steps, rates)
        self.schedule.restore({}, tried.steps)
        while tried.steps < steps:
            if self.one_step():
                raise Interrupted(STOP.reason)
            tried.stopped = divergence(tried.losses, self.start_loss, tried.progress.skipped)
            if tried.stopped is not None:
                tried.diverged, tried.held = True, None
                return
        tried.evaluations[steps] = self.evaluated()
        if not math.isfinite(tried.loss_at(steps)):
            tried.stopped, tried.diverged, tried.held = "diverged: its held-out loss is no number", True, None
            return
        tried.held = hold(self.engine, self.model)

    def evaluated(self) -> dict[str, float]:
        """The held-out figures of the model as it is.

        Raises:
            Interrupted: on every rank, where one was told to stop.
        """
        if not self.evaluate():
            raise Interrupted(STOP.reason)
        return self.listener.figures

    def _save(self) -> None:
        """There is no checkpoint: what a rate needs to go on is held in memory."""

    def _rates(self, rate: float) -> list[float]:
        """Of the engine's groups, as a run at that rate has them."""
        groups = parameter_groups(self.model, rate, self.config.training.weight_decay)
        assert len(groups) == len(self._groups)  # the engine keeps the groups that it was given
        return [float(group["lr"]) for group in groups]

    def _first_state(self) -> Held:
        """Where every rate begins. A step at rates of zero makes the optimizer's moments exist."""
        scaler = self.engine.scaler_state()
        self.stepper.prime(self.plan.batches.batch(0), self._leave_if_stopped)
        return without_steps(hold(self.engine, self.model), scaler)

    def _leave_if_stopped(self) -> None:
        if self.pause():
            raise Interrupted(STOP.reason)

    def _seconds_of_a_step(self) -> float:
        """Of one at rates of zero, whose state is not kept."""
        self.engine.rates = [0.0] * len(self._groups)
        began = time.monotonic()
        if self.stepper.accumulate(self.plan.batches.batch(0), self.pause) is None:
            raise Interrupted(STOP.reason)
        self.engine.step(True)
        seconds = max_over_ranks(time.monotonic() - began)
        put_back(self.first, self.engine, self.model, 0, self.plan.total_steps)
        return seconds


class Listener(Observer):
    """Keeps what an evaluation finds, and shows nothing."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(Display(enabled=False, total_steps=plan.total_steps), None, None, plan.device)
        self.figures: dict[str, float] = {}  # by the keys of metrics.jsonl

    def step(self, finished: FinishedStep, logged: bool) -> None:
        """Local, other than a run's: nothing is logged."""

    def evaluation(self, evaluation: Evaluation, remark: str = "") -> None:
        self.figures = dict(evaluation.values)


def divergence(losses: Sequence[float], start: float, skipped: int) -> str | None:
    """Why a rate is given up, alike on every rank; None where it may go on.

    Arguments:
        losses: of its steps; start: the held-out loss before training; skipped: steps that were not finite.
    """
    if not losses:
        return None
    if skipped or not math.isfinite(losses[-1]):
        return f"diverged: step {len(losses)} was not finite"
    mean = statistics.fmean(losses[-RECENT:])
    if len(losses) >= RECENT and mean > max(FACTOR * start, start + NATS):
        return f"diverged: training loss {mean:.4g} at step {len(losses)}"
    return None
