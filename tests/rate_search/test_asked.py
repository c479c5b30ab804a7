"""What is asked of a search is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.rate_search.asked import Asked

CONFIG = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}


@pytest.mark.parametrize(
    "rates", ["1e-3", "", "1e-3,1e-3", "1e-3,0", "1e-3,-1", "1e-3,x", "1e-3,nan", "1e-3,inf", [1e-3]]
)
def test_rates_are_two_or_more_different_positive_numbers(rates: Any) -> None:
    with pytest.raises(UsageError, match=r"--rates is .*; accepted: two or more different positive numbers, such as"):
        Asked(CONFIG, rates=rates).check()


def test_rates_come_in_ascending_order_from_text_and_from_numbers() -> None:
    assert Asked(CONFIG, rates="1e-2, 3e-4,1").given_rates() == (3e-4, 1e-2, 1.0)
    assert Asked(CONFIG, rates=[2e-2, 1e-3]).given_rates() == (1e-3, 2e-2) and Asked(CONFIG).given_rates() is None


@pytest.mark.parametrize(("name", "options"), [("--steps", {"steps": 0}), ("--eval-samples", {"eval_samples": 0})])
def test_counts_are_at_least_one(name: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0; accepted: a whole number of at least 1"):
        Asked(CONFIG, **options).check()  # type: ignore[arg-type]


def test_the_folder_lies_beside_the_runs_own_and_is_never_a_runs(tmp_path: Path) -> None:
    config = load_config({**CONFIG, "run": {"output_dir": str(tmp_path / "mine")}})
    assert Asked(CONFIG).folder(config).path == tmp_path / "mine-find-lr"
    assert Asked(CONFIG, output=tmp_path / "other").folder(config).path == tmp_path / "other"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "status.json").write_text("{}")
    for taken in ("other", "mine"):
        with pytest.raises(
            UsageError, match=r"--output is .*, which is a run's folder; accepted: one of the search's own"
        ):
            Asked(CONFIG, output=tmp_path / taken).folder(config)
