"""Where all ranks stop together: asked between two pieces of work, answered by one small message every second or two."""

from __future__ import annotations

import time

import torch

from dist_subspace.placement.collectives import gather_objects, largest_over_ranks
from dist_subspace.stopping import Stop

SECONDS = 2.0  # between two messages, about
_MOST = 4096  # pieces of work between two messages


class Pause:
    """Whether the run stops here, as all ranks see it.

    Every rank asks at the same places, so that all come to the message that one of them needs. How many pieces of work lie
    between two messages is reckoned from what the last ones took on the slowest rank, which the message tells: it is the same
    number everywhere, and nothing is sent for short pieces.
    """

    def __init__(self, stop: Stop, max_time: float | None, device: torch.device) -> None:
        self._stop, self._device = stop, device
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._every, self._asked, self._since = 1, 0, time.monotonic()

    def told(self) -> bool:
        """Local: whether this rank was told, by whatever."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._stop.tell("the end of training.max_time")
        return bool(self._stop)

    def __call__(self) -> bool:
        """Collective at every so many calls, the same ones on all ranks: whether all shall stop here."""
        self._asked += 1
        if self._asked < self._every:
            return False
        took = time.monotonic() - self._since
        told, longest = largest_over_ranks([float(self.told()), took], self._device)
        fitting = int(self._asked * SECONDS / max(longest, 1e-3))
        self._every = max(1, min(fitting, 2 * self._every, _MOST))
        self._asked, self._since = 0, time.monotonic()
        return told > 0 and self.agree()

    def agree(self) -> bool:
        """Collective, where at least one rank was told: now all are, by the same. Always true."""
        self._stop.tell(next(reason for reason in gather_objects(self._stop.reason) if reason))
        return True
