"""What a person and a file see of a run. Rank 0 shows and writes; the other ranks only take part in what is agreed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_subspace.accounting import summary
from dist_subspace.placement.collectives import max_over_ranks, world
from dist_subspace.training.display import Display
from dist_subspace.training.memory import peak_memory
from dist_subspace.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from dist_subspace.training.trackers import Trackers


class Observer:
    """Display, metrics.jsonl and trackers, fed with the same records."""

    def __init__(
        self, display: Display, metrics: MetricsWriter | None, trackers: Trackers | None, device: torch.device
    ):
        self.display, self.metrics, self.trackers, self.device = display, metrics, trackers, device
        self._losses: list[float] = []
        self._tokens, self._seconds = 0, 0.0
        self.reached: Callable[[int], None] = lambda step: None  # told the number of each step that is made

    def start(self, step: int) -> None:
        self.display.start(step)

    def notice(self, text: str) -> None:
        self.display.notice(text)

    def warning(self, text: str) -> None:
        self.display.warning(text)

    def model_ready(self, model: nn.Module) -> None:
        found = summary(model)
        rows = [(row.name, row.trainable, row.frozen, row.bytes_on_rank) for row in found.rows]
        self.display.show_summary(rows, title=f"method {found.method}")

    def step(self, record: dict[str, Any], tokens: int, logged: bool) -> None:
        """Collective where `logged`. The loss that is logged is the mean over the steps since the last logged one, the
        speed that over their time."""
        self._losses.append(record["loss"])
        self._tokens += tokens
        self._seconds += tokens / record["tokens_per_second"] if record["tokens_per_second"] else 0.0
        self.display.advance(record["step"])
        self.reached(record["step"])
        if not logged:
            return
        record = record | {
            "loss": sum(self._losses) / len(self._losses),
            "tokens_per_second": self._tokens / max(self._seconds, 1e-9),
            "peak_memory_bytes": int(max_over_ranks(peak_memory(self.device))),
        }
        self._losses, self._tokens, self._seconds = [], 0, 0.0
        if world().is_main:
            if self.metrics is not None:
                self.metrics.step(record)
            if self.trackers is not None:
                self.trackers.log(record, record["step"])
            self.display.update(record["step"], record)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if world().is_main:
            if self.metrics is not None:
                self.metrics.evaluation(step, values)
            if self.trackers is not None:
                self.trackers.log(dict(values), step)
            self.display.evaluation({"step": step, **values})

    def settle(self) -> None:
        """Local: what was recorded so far is on disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def saved(self, folder: Path) -> None:
        self.display.notice(f"saved {folder}")

    @contextmanager
    def loading(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar for the load."""
        with self.display.loading(what) as advance:
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
        self.display.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close()
