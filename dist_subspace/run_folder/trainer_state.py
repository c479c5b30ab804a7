"""trainer_state.json of a checkpoint: where the run stood when it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import write_json_atomic
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import CheckpointFolder

FORMAT = 1


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after `step` optimizer steps.

    samples, tokens: consumed so far. fingerprints: of the base model, the method and the data, by name. best: the metric,
    step and checkpoint of the best evaluation. method: the state of the method's own schedule. loss_scaler:
    where fp16's dynamic loss scaling stands (empty: there is none, or the checkpoint is older than this field). skipped,
    overflowed: steps that were not applied, as not finite or as beyond fp16's range. training: the configuration's section
    (empty: the checkpoint is older than this field). unevaluated: an evaluation was due after this step and was not made,
    because the run was interrupted. begun: the subspace of a run that began with another adapter's weights (empty: it did not).
    stale: evaluations since the best one.
    """

    step: int
    samples: int
    tokens: int
    elapsed_seconds: float
    optimizer_steps: int
    schedule: dict[str, Any]
    fingerprints: dict[str, str]
    best: dict[str, Any] | None = None
    skipped: int = 0
    method: dict[str, Any] = field(default_factory=dict)
    loss_scaler: dict[str, float] = field(default_factory=dict)
    unevaluated: bool = False
    overflowed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict)
    stale: int = 0


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    """Into a checkpoint's folder.

    Raises:
        StorageError: the disk refuses.
    """
    write_json_atomic(CheckpointFolder(folder).trainer_state, {"format": FORMAT, **asdict(state)})


def read_trainer_state(folder: Path) -> TrainerState:
    """From a checkpoint's folder.

    Raises:
        UsageError: the file is of another format.
    """
    file = CheckpointFolder(folder).trainer_state
    stored = json.loads(file.read_text())
    if stored.pop("format", None) != FORMAT:
        raise UsageError(f"{file} is of another format than {FORMAT}, which this version reads")
    return TrainerState(**stored)
