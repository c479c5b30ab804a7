"""The lines of tests/benchmarks/learning_rates.py as a table: the method's own rate beside the best of the grid."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dist_subspace.subspace import SubspaceConfig, methods, suggested_rate
from tests.docs_tables import markdown

WIDTH = {"banking77": 384, "openbookqa": 64}
ENOUGH = 3  # seeds that a mean is made of, where there are so many


def rates_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One table for each task; methods whose own rate was not measured have no row."""
    return "\n".join(_of_task(task, [line for line in lines if line["task"] == task]) for task in WIDTH)


def _of_task(task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for method in methods():
        own = [line for line in lines if line["method"] == method and not line["changes"]]
        means = _means(own, "accuracy" if task == "banking77" else "loss")
        auto = suggested_rate(SubspaceConfig(method=method), WIDTH[task]).rate
        if auto in means:
            seeds = len({line["seed"] for line in own if line["rate"] == auto})
            rows.append((f"`{method}`", *_cells(task, means, auto), str(seeds)))
    figure = "accuracy" if task == "banking77" else "perplexity"
    header = (
        "method",
        "its own rate",
        figure,
        "next lower",
        "next higher",
        "best of the grid",
        "behind it by",
        "seeds",
    )
    return f"{task}\n\n{markdown(header, rows)}"


def _means(lines: Sequence[Mapping[str, Any]], figure: str) -> dict[float, float]:
    """The mean of each rate, over the seeds that every rate has."""
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for line in lines:
        by_rate[line["rate"]][line["seed"]] = line[figure]
    whole = max((len(seeds) for seeds in by_rate.values()), default=0)
    return {rate: fmean(seeds.values()) for rate, seeds in by_rate.items() if len(seeds) >= min(whole, ENOUGH)}


def _cells(task: str, means: Mapping[float, float], auto: float) -> tuple[str, ...]:
    accuracy = task == "banking77"
    shown = {rate: mean if accuracy else math.exp(mean) for rate, mean in means.items()}
    best = (max if accuracy else min)(shown, key=shown.__getitem__)
    behind = (
        f"{100 * (shown[best] - shown[auto]):.1f} points"
        if accuracy
        else f"{100 * (shown[auto] / shown[best] - 1):.1f} %"
    )
    below, above = max((r for r in shown if r < auto), default=None), min((r for r in shown if r > auto), default=None)

    def cell(rate: float | None) -> str:
        return "-" if rate is None else f"{shown[rate]:.{3 if accuracy else 2}f} at {rate:g}"

    return (f"{auto:g}", cell(auto).partition(" ")[0], cell(below), cell(above), cell(best), behind)
