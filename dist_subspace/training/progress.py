"""How far a run has come, and which of its checkpoints counts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_subspace.run_folder.folder import RunFolder


@dataclass
class Progress:
    """What changes as the run goes on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    overflowed: int = 0
    elapsed_before: float = 0.0
    best: dict[str, Any] | None = None
    stale: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.began

    @property
    def not_applied(self) -> int:
        """Steps that changed nothing: not finite, or beyond fp16's range at its loss scale."""
        return self.skipped + self.overflowed


def best_in_run(run_dir: RunFolder, resumed: Path, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Local, rank 0: the best that the resumed checkpoint knew of, if it lies in this run. A named checkpoint may come from
    another one, where it may be deleted, and whose numbers say nothing about the folders here."""
    if best is None or not run_dir.holds(resumed):
        return None
    return best if run_dir.checkpoint(best["step"]).is_dir() else None
