"""The keys of the section `training`."""

from __future__ import annotations

from tests.keys import training_batch, training_manner, training_optimizer, training_preference, training_schedule

KEYS = [
    *training_preference.KEYS,
    *training_batch.KEYS,
    *training_optimizer.KEYS,
    *training_schedule.KEYS,
    *training_manner.KEYS,
]
