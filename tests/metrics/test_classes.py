"""Figures of classes: those of scikit-learn, and values of its documentation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn

from dist_subspace.metrics.classes import accuracy, confusion, f1, matthews


@pytest.mark.parametrize(
    ("true", "predicted", "classes", "share", "mean"),
    [
        # sklearn.metrics.f1_score, first example: macro 0.26... (4/15), accuracy 2/6
        ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3, 1 / 3, 4 / 15),
        # sklearn.metrics.classification_report, first example: macro avg f1-score 0.49, accuracy 0.60
        ([0, 1, 2, 2, 2], [0, 0, 2, 2, 1], 3, 0.6, (2 / 3 + 0 + 0.8) / 3),
        # the same page, second example: classes 1, 2, 3 asked for; only 0 and 1 occur
        ([1, 1, 1], [1, 1, 0], 4, 2 / 3, (0.8 + 0) / 2),
        # labels 1 to 3, all of them right: class 0 does not occur
        ([1, 2, 3, 3], [1, 2, 3, 3], 4, 1.0, 1.0),
        # a class that is only predicted counts, one that is only true too
        ([1, 1, 2], [1, 3, 1], 5, 1 / 3, (0.5 + 0 + 0) / 3),
        # two classes: F1 of class 1, whatever class 0 is
        ([0, 0, 1, 1], [0, 1, 1, 1], 2, 0.75, 0.8),
        ([0, 0], [0, 0], 2, 1.0, 0.0),
        ([0, 0, 0], [0, 0, 0], 1, 1.0, 1.0),
    ],
)
def test_accuracy_and_f1_are_those_of_the_documentation(
    true: list[int], predicted: list[int], classes: int, share: float, mean: float
) -> None:
    counts = confusion(np.array(true), np.array(predicted), classes)
    assert (accuracy(counts), f1(counts)) == (pytest.approx(share), pytest.approx(mean))


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_figures_are_those_of_scikit_learn_on_any_classes(classes: int, size: int) -> None:
    true, predicted = np.random.default_rng(size).integers(0, classes, (2, size))
    counts = confusion(true, predicted, classes)
    average = "binary" if classes == 2 else "macro"
    assert accuracy(counts) == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert f1(counts) == pytest.approx(sklearn.f1_score(true, predicted, average=average, zero_division=0))
    assert matthews(counts) == pytest.approx(sklearn.matthews_corrcoef(true, predicted))
