"""Figures from results, their intervals, and how they are shown."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dist_subspace.errors import UsageError
from dist_subspace.evaluation.figures import (
    ANSWERS,
    CLASSES,
    LIKELIHOOD,
    METRICS,
    Measured,
    chosen,
    difference,
    measured,
)
from dist_subspace.evaluation.results import ADAPTER, BASE, Evaluated, print_figures, write_result
from dist_subspace.metrics.intervals import wilson
from dist_subspace.run_folder.folder import RunFolder


def likelihoods(count: int, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [{"loss": float(generator.exponential(9)), "targets": int(generator.integers(1, 9))} for _ in range(count)]


def test_a_loss_weighs_every_target_alike() -> None:
    results = [{"loss": 6.0, "targets": 1}, {"loss": 6.0, "targets": 5}]
    assert measured("loss", results).value == 2.0
    assert measured("perplexity", results).value == pytest.approx(math.e**2)


def test_a_share_has_wilsons_interval_and_a_mean_the_bootstraps() -> None:
    results = [{"wanted": "x y", "answer": answer} for answer in ("x y", "y z", "d", "x y")]
    assert measured("exact_match", results) == Measured(0.5, wilson(2, 4))
    f1 = measured("token_f1", results)
    assert f1.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert f1.interval is not None and 0 <= f1.interval[0] < f1.value < f1.interval[1] <= 1


def test_a_difference_is_drawn_in_pairs() -> None:
    """Losses that differ by little from sample to sample differ by little, however far the samples are apart."""
    base = likelihoods(200, 0)
    ours = [result | {"loss": result["loss"] - 0.1 * result["targets"]} for result in base]
    found = difference("loss", ours, base)
    assert found.value == pytest.approx(-0.1) and found.interval == pytest.approx((-0.1, -0.1))


def test_correlations_are_of_the_numbers_that_labels_are() -> None:
    labels, true, predicted = ["0", "1", "5"], [0, 1, 2, 2, 1], [0, 2, 2, 1, 0]
    results = [{"label": t, "predicted": p} for t, p in zip(true, predicted)]
    values = np.array([float(label) for label in labels])
    expected = stats.pearsonr(values[true], values[predicted]).statistic
    assert measured("pearson", results, labels).value == pytest.approx(expected)
    assert measured("spearman", results, labels).value == pytest.approx(stats.spearmanr(true, predicted).statistic)
    with pytest.raises(UsageError, match="pearson, a correlation of numbers, and the labels are texts"):
        measured("pearson", results, ["x", "y", "z"])


def test_figures_are_chosen_by_what_the_task_gives() -> None:
    kinds = (CLASSES,)
    assert chosen((), kinds, ("loss", "accuracy")) == ("loss", "accuracy")
    assert chosen(("f1", "f1", "loss"), kinds, ()) == ("f1", "loss")
    with pytest.raises(
        UsageError, match=r"--metrics is 'acuracy' \(did you mean 'accuracy'\?\); accepted: loss, accuracy, f1"
    ):
        chosen(("acuracy",), kinds, ())
    with pytest.raises(UsageError, match="--metrics has exact_match, which needs answers"):
        chosen(("exact_match",), kinds, ())
    assert {kind for metric in METRICS.values() for kind in metric.kinds} > {CLASSES, LIKELIHOOD, ANSWERS}


def test_what_was_measured_is_a_table_and_json(tmp_path: Path) -> None:
    about = {
        "adapter": "runs/x/adapter",
        "base": "m",
        "storage": "nf4",
        "data": "t.jsonl",
        "samples": {"likelihood": 1200},
    }
    found = Evaluated(
        about, {who: {"loss": Measured(value, (1.0, 2.0))} for who, value in ((ADAPTER, 1.5), (BASE, 1.75))}
    )
    found.figures[BASE]["exact_match"] = found.figures[ADAPTER]["exact_match"] = Measured(0.12345, None)
    found.difference = {"loss": Measured(-0.25, None), "exact_match": Measured(math.nan, None)}
    out = io.StringIO()
    print_figures(found, Console(file=out, width=120, force_terminal=True, no_color=True))
    shown = out.getvalue()
    assert "runs/x/adapter (nf4) on t.jsonl: 1,200 samples" in shown
    assert "1.5000 [1.0000, 2.0000]" in shown and "12.3" in shown and "-0.2500" in shown
    file = write_result(RunFolder(tmp_path), found.as_dict(), Path("checkpoint-7"), "data/my test.jsonl")
    assert file == tmp_path / "evaluations" / "checkpoint-7-on-my-test.json"
    kept = json.loads(file.read_text())
    assert kept["adapter"]["loss"] == {"value": 1.5, "interval": [1.0, 2.0]}
    assert kept["difference"]["exact_match"]["value"] is None and kept["about"] == about
