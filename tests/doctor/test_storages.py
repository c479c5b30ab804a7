"""Every registered storage is really tried; one that gives other numbers, or none, is named."""

from __future__ import annotations

import pytest
import torch

from dist_subspace.doctor.storages import examine, judge, try_storage
from dist_subspace.storage import pack, storages
from dist_subspace.storage.operator import FrozenLinear
from tests.doctor.facts import ranks_of, sentences


def test_every_storage_works_here_and_what_it_may_lose_is_near_what_it_loses() -> None:
    found = examine("cpu")
    assert set(found) == set(storages()) and all(facts["wrong"] is None for facts in found.values()), found


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("decode", lambda self, dtype: torch.zeros(self.shape, dtype=dtype), "the packed matrix is 1.00 away"),
        ("product", lambda self, x: (x.float() @ self.decode(torch.float32).t() * 1.1).to(x.dtype), "the product is"),
        ("transposed_product", lambda self, g: (g @ self.decode(g.dtype)).mul(0.9), "the gradient is"),
    ],
)
def test_a_storage_that_computes_something_else_is_found(
    name: str, broken: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(pack(torch.ones(64, 64), "nf4"))
    assert issubclass(kind, FrozenLinear)
    monkeypatch.setattr(kind, name, broken)
    assert (try_storage("nf4", "cpu") or "").startswith(said)


def test_what_does_not_work_breaks_the_runs_that_use_it() -> None:
    facts = {"nf4": {"wrong": None, "seconds": 0}, "fp8": {"wrong": "no kernel", "seconds": 0}}
    bare = ranks_of("storages", [facts])
    assert sentences(bare, judge(bare), breaks=True) == ["node1: storage fp8 does not work on the device: no kernel"]
    for chosen, breaks in (("fp8", True), ("nf4", False)):
        ranks = ranks_of("storages", [facts], configuration=[{"storage": chosen}])
        assert [found.breaks for found in judge(ranks)] == [breaks]
