"""What is asked of a search for the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder

SAMPLES = 512  # of the held-out ones, that a comparison looks at
_ACCEPTED = "accepted: two or more different positive numbers, such as 1e-4,1e-3"


@dataclass(frozen=True)
class Asked:
    """config: a YAML file or the sections; rates: as text with commas between, or numbers, None for a grid around the method's
    own; steps: of the rates that get furthest; output: the folder of the results; eval_samples: held-out samples that a
    comparison looks at, drawn by the seed."""

    config: str | Path | Mapping[str, Any]
    overrides: Sequence[str] = ()
    rates: str | Sequence[float] | None = None
    steps: int | None = None
    output: str | Path | None = None
    eval_samples: int = SAMPLES
    as_json: bool = False

    def check(self) -> None:
        """Local: what needs no configuration.

        Raises:
            UsageError: an option out of its range.
        """
        self.given_rates()
        for name, value in (("--steps", self.steps), ("--eval-samples", self.eval_samples)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; accepted: a whole number of at least 1")

    def given_rates(self) -> tuple[float, ...] | None:
        """The rates that were named, ascending; None where none was.

        Raises:
            UsageError: fewer than two, one twice, or what is no positive number.
        """
        if self.rates is None:
            return None
        words = self.rates.split(",") if isinstance(self.rates, str) else list(self.rates)
        shown = self.rates if isinstance(self.rates, str) else ",".join(map(str, words))
        try:
            rates = sorted(float(word) for word in words)
        except (TypeError, ValueError):
            raise UsageError(f"--rates is {shown!r}; {_ACCEPTED}") from None
        if len(set(rates)) < max(2, len(rates)) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UsageError(f"--rates is {shown!r}; {_ACCEPTED}")
        return tuple(rates)

    def folder(self, config: Config) -> RunFolder:
        """Where the results lie: beside the run's own folder, which is left alone.

        Raises:
            UsageError: a folder that holds a run.
        """
        own = RunFolder(config.run.output_dir)
        folder = RunFolder(self.output or own.path.with_name(f"{own.path.name}-find-lr"))
        if folder.path.resolve() == own.path.resolve() or folder.config.exists() or folder.status.exists():
            raise UsageError(f"--output is {str(folder)!r}, which is a run's folder; accepted: one of the search's own")
        return folder
