"""Successive halving over learning rates: all for a few steps, the better half for twice as many, and so on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dist_subspace.rate_search.bench import Tried
from dist_subspace.rate_search.grid import EXTENSIONS, beyond, kept, rate_text
from dist_subspace.report.quantities import amount, clock_text
from dist_subspace.training.pulse import Pulse

_SILENCE = 20.0  # seconds after which a rate that is trained still is spoken of, and then each minute


class Trains(Protocol):
    """What trains a rate, from where it stands."""

    def train(self, tried: Tried, steps: int) -> None:
        """Until it has made so many steps and is measured, or is given up."""


class Search:
    """The rates that were tried so far, by rung. Collective where `bench` is: every rank makes the same decisions, of losses that
    all have.

    Arguments:
        rates: tried first; rungs: after how many steps they are compared; extends: whether rates beyond the ends are tried where
            the best lies there.
    """

    def __init__(
        self, bench: Trains, rates: Sequence[float], rungs: Sequence[int], extends: bool, say: Callable[[str], None]
    ) -> None:
        self.bench, self.rungs, self.say = bench, list(rungs), say
        self.tried = [Tried(rate) for rate in rates]
        self.left = EXTENSIONS if extends else 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Try all rates."""
        for number, steps in enumerate(self.rungs):
            going = self.going()
            for tried in going:
                self._train(tried, steps)
            self._extend(steps)
            if number + 1 < len(self.rungs):
                self._halve(steps)

    def going(self) -> list[Tried]:
        return [tried for tried in self.tried if tried.stopped is None]

    @property
    def best(self) -> Tried | None:
        """The rate of the lowest held-out loss among those that got furthest; None where no rate was measured. A rate that
        diverged is none, nor one whose state at the end is not the one that was measured."""
        measured = [tried for tried in self.tried if tried.evaluations and not tried.diverged]
        if not measured:
            return None
        furthest = max(max(tried.evaluations) for tried in measured)
        return self._best_at(furthest)

    @property
    def edge(self) -> str | None:
        """The end of all rates that the best one lies at: lower or upper; None within them."""
        best, rates = self.best, [tried.rate for tried in self.tried]
        if best is None or min(rates) < best.rate < max(rates):
            return None
        return "upper" if best.rate == max(rates) else "lower"

    def _best_at(self, steps: int) -> Tried | None:
        at = [tried for tried in self.tried if steps in tried.evaluations and not tried.diverged]
        return min(at, key=lambda tried: (tried.loss_at(steps), tried.rate), default=None)

    def _train(self, tried: Tried, steps: int) -> None:
        what = f"learning rate {rate_text(tried.rate)}"
        pulse = Pulse(lambda: self.say(f"{what} | step {tried.steps} of {steps} | loss {amount(tried.loss)}"), _SILENCE)
        try:
            self.bench.train(tried, steps)
        finally:
            pulse.close()
        parts = [what, f"step {tried.steps}"]
        if tried.stopped is not None:
            parts.append(tried.stopped)
        else:
            parts += [f"loss {amount(tried.loss)}", f"validation {amount(tried.loss_at(steps))}"]
        self.say(" | ".join([*parts, clock_text(time.monotonic() - self._began)]))

    def _extend(self, steps: int) -> None:
        """While the best at this rung lies at an end of all rates, try the next one beyond it; where all diverge, a lower one."""
        while self.left and (upwards := self._open_side(steps)) is not None:
            self.left -= 1
            best, further = self._best_at(steps), Tried(beyond([tried.rate for tried in self.tried], upwards))
            why = (
                "every rate diverges"
                if best is None
                else f"the best rate, {rate_text(best.rate)}, is at an end of the grid"
            )
            self.say(f"{why}: {rate_text(further.rate)} is tried, too")
            self.tried.append(further)
            self._train(further, steps)

    def _open_side(self, steps: int) -> bool | None:
        """Whether better rates may lie above all that were tried (True) or below them (False); None where neither is likely."""
        best, rates = self._best_at(steps), [tried.rate for tried in self.tried]
        if best is None:
            return False if steps == self.rungs[0] else None
        if min(rates) < best.rate < max(rates):
            return None
        return best.rate == max(rates)

    def _halve(self, steps: int) -> None:
        going = sorted(self.going(), key=lambda tried: (tried.loss_at(steps), tried.rate))
        count = kept(len(going))
        for tried in going[count:]:
            tried.stopped = f"not among the best {count} of {len(going)}"
            tried.held = None
