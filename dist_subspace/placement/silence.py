"""How long nothing was heard, counted in this process's own looks. Local."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]


class Silence:
    """Seconds since somebody was last heard. A pause of this process itself (stopped, starved, a laptop that slept) counts as one
    look of `longest` seconds: nobody is blamed for what was not listened to."""

    def __init__(self, longest: float, clock: Clock = time.monotonic) -> None:
        self._longest, self._clock = longest, clock
        self._looked = clock()
        self._heard: object = None
        self.seconds = 0.0

    def look(self, sign: object) -> float:
        """The seconds of silence, where `sign` is the last sign of life: another one than before ends it."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, self._longest), now
        if sign != self._heard:
            self._heard, self.seconds = sign, 0.0
        else:
            self.seconds += passed
        return self.seconds
