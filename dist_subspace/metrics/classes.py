"""Figures of predicted classes, from counts `(true class, predicted class)`."""

from __future__ import annotations

import numpy as np


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """`(classes, classes)` float64: how many samples of each true class were taken for each class.

    Arguments:
        true, predicted: `(n,)` class ids.
    """
    pairs = np.asarray(true, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.float64)


def accuracy(counts: np.ndarray) -> float:
    return float(np.trace(counts) / max(counts.sum(), 1.0))


def f1(counts: np.ndarray) -> float:
    """Two classes: F1 of class 1, 0 where it neither occurs nor is predicted (scikit-learn's `average="binary"`). More: the mean
    of F1 over the classes that are true or predicted somewhere (its `average="macro"`): an id that no sample has, and a class
    that this part of the data lacks, are no failures."""
    made = counts.sum(0) + counts.sum(1)
    of_class = 2 * np.diagonal(counts) / np.maximum(made, 1.0)
    if counts.shape[0] == 2:
        return float(of_class[1])
    occurs = made > 0
    return float(of_class[occurs].sum() / max(int(occurs.sum()), 1))


def matthews(counts: np.ndarray) -> float:
    """The correlation coefficient of Matthews for any number of classes (Gorodkin 2004), 0 where one side is constant."""
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
    if spread == 0:
        return 0.0
    return float((np.trace(counts) * total - true @ predicted) / np.sqrt(spread))
