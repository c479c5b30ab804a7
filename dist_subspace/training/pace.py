"""How long the rest of a run takes, by what its last steps, evaluations and checkpoints took. Local."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from dist_subspace.report.quantities import clock_text

_LAST = 100  # steps that count: a machine gets slower and faster


class Pace:
    """The time that is left of `total_steps` steps.

    The first step of a process makes kernels and buffers, and takes a multiple of the others': it counts until there is another.

    Arguments:
        every: how many steps lie between two of what is done beside the steps, by name (`aside`); None: only behind the last.
            What has no name here is done once.
    """

    def __init__(
        self, total_steps: int, every: Mapping[str, int | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self._every, self._clock = total_steps, dict(every), clock
        self._step, self._mark, self._beside = 0, math.nan, 0.0
        self._first: float | None = None
        self._steps: deque[float] = deque(maxlen=_LAST)
        self._asides: dict[str, float] = {}

    def start(self, step: int) -> None:
        """Training begins after `step` finished steps."""
        self._step, self._mark, self._beside = step, self._clock(), 0.0

    def step(self, number: int) -> None:
        """Step `number` is finished."""
        now = self._clock()
        if number <= self._step or math.isnan(self._mark):
            return
        seconds = (now - self._mark - self._beside) / (number - self._step)
        self._step, self._mark, self._beside = number, now, 0.0
        if self._first is None:
            self._first = seconds
        else:
            self._steps.append(seconds)

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Within the block something is done that is no step."""
        began = self._clock()
        try:
            yield
        finally:
            self._asides[kind] = self._clock() - began
            self._beside += self._asides[kind]

    @property
    def seconds(self) -> float:
        """Until the end; infinite while no step is finished."""
        left = max(0, self.total_steps - self._step)
        if not left:
            return 0.0
        if self._first is None:
            return math.inf
        step = sum(self._steps) / len(self._steps) if self._steps else self._first
        return left * step + sum(self._due(kind) * seconds for kind, seconds in self._asides.items())

    def text(self) -> str:
        """In words; of a first step alone only a bound is known."""
        if self._first is not None and not self._steps and self._step < self.total_steps:
            return f"at most {clock_text(self.seconds)} left"
        return f"{clock_text(self.seconds)} left"

    def _due(self, kind: str) -> int:
        """How often it will be done yet: behind the last step in any case, but never again where nothing is said of it."""
        if kind not in self._every:
            return 0
        every = self._every[kind]
        if not every:
            return 1
        return self.total_steps // every - self._step // every + bool(self.total_steps % every)
