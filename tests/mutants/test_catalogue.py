"""The catalogue of mutants keeps up with the tree: each text stands where it says, each test is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.catalogue import mutants
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
ALL = mutants()


def test_there_are_enough_of_them_and_no_two_have_a_name() -> None:
    assert len(ALL) >= 60
    assert [name for name, times in Counter(mutant.name for mutant in ALL).items() if times > 1] == []


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_breaks_the_product_as_it_stands(mutant: Mutant) -> None:
    assert mutant.file.startswith(("dist_subspace/", "launch/")), "only the product is broken, never a test"
    broken = mutant.applied_to((ROOT / mutant.file).read_text(encoding="utf-8"))
    assert mutant.text != mutant.becomes
    if mutant.file.endswith(".py"):
        compile(broken, mutant.file, "exec")  # a syntax error would turn any test red
    assert mutant.tests, "a mutant names the tests that notice it"
    for test in mutant.tests:
        assert _is_there(test), f"{test} is not in the tree"


def _is_there(test: str) -> bool:
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    function = re.escape(name.partition("[")[0].rpartition("::")[2])
    return not name or re.search(rf"^\s*def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.M) is not None
