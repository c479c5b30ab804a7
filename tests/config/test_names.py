"""The configuration's closed lists are those of the parts that they are about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import pytest
from transformers import SchedulerType

from dist_subspace.config import names
from dist_subspace.families.classes import AUTO_CLASSES
from dist_subspace.loading.load import DTYPES
from dist_subspace.placement.engines import ALL_PRESETS
from dist_subspace.subspace.core.constraints import CONSTRAINTS
from dist_subspace.training.data import formats, settings
from dist_subspace.training.optimizers import ON_ANY_DEVICE, ON_CUDA
from dist_subspace.training.trackers import PACKAGES


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("Optimizer", [*ON_ANY_DEVICE, *ON_CUDA]),
        ("Preset", ALL_PRESETS),
        ("Format", formats.FORMATS),
        ("Format", settings.FORMATS),
        ("Truncation", settings.TRUNCATIONS),
        ("Constraint", CONSTRAINTS),
        ("Reporter", PACKAGES),
        ("Dtype", DTYPES),
    ],
)
def test_the_configuration_knows_what_its_owner_knows(name: str, owners: Iterable[str]) -> None:
    accepted = _accepted(name)
    assert len(accepted) == len(set(accepted)) and set(accepted) == set(owners)


@pytest.mark.parametrize(
    ("name", "owners"), [("Task", AUTO_CLASSES), ("Scheduler", [kind.value for kind in SchedulerType])]
)
def test_what_the_configuration_lets_through_is_known_to_its_owner(name: str, owners: Iterable[str]) -> None:
    assert set(_accepted(name)) <= set(owners)


def _accepted(name: str) -> tuple[Any, ...]:
    return get_args(getattr(names, name))
