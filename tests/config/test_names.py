"""The configuration's closed lists are those of the parts that they are about."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from transformers import SchedulerType

import dist_subspace
from dist_subspace.config import load, names
from dist_subspace.config.messages import dotted_keys
from dist_subspace.config.schema import Config
from dist_subspace.families.classes import AUTO_CLASSES
from dist_subspace.loading.load import DTYPES
from dist_subspace.placement.engines import ALL_PRESETS
from dist_subspace.subspace.core.constraints import CONSTRAINTS
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS
from dist_subspace.training.data.formats import FORMATS
from dist_subspace.training.optimizers import ON_ANY_DEVICE, ON_CUDA
from dist_subspace.training.trackers import KINDS

PACKAGE = Path(dist_subspace.__file__).parent
CLOSED = [name for name, value in vars(names).items() if get_origin(value) is Literal]

EQUAL: list[tuple[str, Iterable[str]]] = [
    ("Optimizer", [*ON_ANY_DEVICE, *ON_CUDA]),
    ("Preset", ALL_PRESETS),
    ("Format", FORMATS),
    ("Constraint", CONSTRAINTS),
    ("Reporter", KINDS),
    ("Dtype", DTYPES),
    ("ExpertParameters", EXPERT_PARAMETERS),
]
PARTS: list[tuple[str, Iterable[str]]] = [("Task", AUTO_CLASSES), ("Scheduler", [kind.value for kind in SchedulerType])]
TWO_WORDS = {"OnNonfinite", "Truncation"}  # the code that follows them compares with one of the two
# Where each list of three names or more is written out, beside the configuration.
HOMES: dict[str, str | None] = {
    "Dtype": "loading/load.py",
    "Format": "training/data/formats.py",
    "Constraint": "subspace/core/constraints.py",
    "Reporter": "training/tracked.py",
    "Difference": "training/plan.py",
    "Objective": "config/preference.py",
    "DpoLoss": None,  # TRL's alone; `check_trl` asks it for each
    "KtoLoss": None,
    "PreferenceLoss": None,
}


@pytest.mark.parametrize(("name", "owners"), EQUAL)
def test_the_configuration_knows_what_its_owner_knows(name: str, owners: Iterable[str]) -> None:
    accepted = _accepted(name)
    assert len(accepted) == len(set(accepted)) and set(accepted) == set(owners)


@pytest.mark.parametrize(("name", "owners"), PARTS)
def test_what_the_configuration_lets_through_is_known_to_its_owner(name: str, owners: Iterable[str]) -> None:
    assert set(_accepted(name)) <= set(owners)


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_list_stands_with_its_owner_and_nowhere_else(name: str) -> None:
    """A third list would be forgotten by who adds a name. A list of two names may be of something else."""
    wanted = set(_accepted(name))
    found = {path for path, written in _written_lists() if written == wanted and len(wanted) > 2}
    assert found - {"config/names.py"} == {path for path in (HOMES.get(name),) if path}


def test_no_closed_list_is_left_out_here() -> None:
    assert set(CLOSED) == {name for name, _ in EQUAL + PARTS} | TWO_WORDS | HOMES.keys()


def test_what_decides_about_keys_names_keys_that_there_are() -> None:
    known = {*dotted_keys(Config), "training.warmup_ratio"}
    assert known >= load._PLACES
    for key, other in load._EITHER.items():
        assert {key, f"{key.partition('.')[0]}.{other}"} <= known
    assert set(names.SHORT_DTYPES.values()) == set(_accepted("Dtype"))


def _accepted(name: str) -> tuple[Any, ...]:
    return get_args(getattr(names, name))


def _written_lists() -> list[tuple[str, set[str]]]:
    """Every list of names in the package's source, with its file."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if words and len(words) == len(parts):
                found.append((file.relative_to(PACKAGE).as_posix(), set(words)))
    return found
