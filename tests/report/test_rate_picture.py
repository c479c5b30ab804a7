"""The picture of a search shows every rate that was measured, also where one diverged or nothing was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.image import imread

from dist_subspace.report.rate_picture import BAD, BEST, points, rate_picture


def found(losses: dict[float, dict[int, float | None]], rate: float | None, start: float = 2.0) -> dict[str, Any]:
    tried = [
        {
            "learning_rate": one,
            "diverged": not at,
            "evaluations": [{"step": step, "eval_loss": loss} for step, loss in at.items()],
        }
        for one, at in losses.items()
    ]
    about = {"model": "m", "method": "ssb", "storage": "nf4", "data": "heldout.jsonl"}
    return {
        "learning_rate": rate,
        "own_rate": 1e-2,
        "start_loss": start,
        "rungs": [2, 4],
        "tried": tried,
        "about": about,
    }


def has_colour(picture: Path, colour: str) -> bool:
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((numpy.abs(pixels - wanted).max(axis=2) <= 2).any())


def test_points_are_the_rates_that_a_rung_has_measured_in_order() -> None:
    made = found({1e-1: {2: 1.5}, 1e-3: {2: 1.9, 4: 1.8}, 1e-2: {2: None}}, 1e-3)
    assert points(made, 2) == [(1e-3, 1.9), (1e-1, 1.5)] and points(made, 4) == [(1e-3, 1.8)]


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({1e-3: {2: 1.9}, 1e-2: {2: 1.2, 4: 0.1}, 1e-1: {2: 9.0, 4: 40.0}, 1.0: {}}, 1e-2),
        ({1e-1: {}, 1.0: {}}, None),
    ],
)
def test_the_best_and_the_diverged_are_marked_where_there_are_some(
    losses: dict[float, dict[int, float | None]], rate: float | None, tmp_path: Path
) -> None:
    picture = rate_picture(found(losses, rate) | ({} if rate else {"own_rate": None}), tmp_path / "rates.png")
    assert has_colour(picture, BEST) == (rate is not None)
    assert has_colour(picture, BAD) == any(not at for at in losses.values())
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"], "it appears by a rename"
