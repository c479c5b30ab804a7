"""The figures by name: from which results each is made, and the interval around it.

Results are one mapping a sample, in the data's order, whatever rank made them; each kind of measurement has its own keys:

likelihood   loss, targets: of the sample's own answer (or label)
classes      label, predicted: class ids, beside the keys of a likelihood
choices      right, log_likelihoods, lengths: a number for each choice; lengths are characters
answers      wanted, answer: texts, null where the expression finds nothing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.metrics import answers, classes, correlation
from dist_subspace.metrics.intervals import Interval, bootstrap, wilson
from dist_subspace.metrics.losses import mean_loss, perplexity

LIKELIHOOD, CLASSES, CHOICES, ANSWERS = "likelihood", "classes", "choices", "answers"
Result = Mapping[str, Any]
Some = np.ndarray | None  # numbers of samples, some several times; None for all, each once
Figure = Callable[[Some], float]


@dataclass(frozen=True)
class Metric:
    """kinds: of results, of each of which it can be made; make: from results and names of classes to the figure of some of
    the samples; is_share: whether it is the mean of a hit or a miss a sample."""

    kinds: tuple[str, ...]
    make: Callable[[Sequence[Result], Sequence[str]], Figure]
    is_share: bool = False


@dataclass(frozen=True)
class Measured:
    """A figure, with its interval of 95 % where it has one."""

    value: float
    interval: Interval | None


def measured(name: str, results: Sequence[Result], labels: Sequence[str] = ()) -> Measured:
    """The figure of these results, the same to the last digit wherever they were made.

    Raises:
        UsageError: the figure is not defined for these labels.
    """
    metric = METRICS[name]
    figure = metric.make(results, labels)
    value = figure(None)
    if metric.is_share:
        return Measured(value, wilson(round(value * len(results)), len(results)))
    return Measured(value, bootstrap(len(results), figure))


def difference(name: str, ours: Sequence[Result], others: Sequence[Result], labels: Sequence[str] = ()) -> Measured:
    """Ours less the others', of the same samples in the same order: both are drawn together."""
    first, second = (METRICS[name].make(results, labels) for results in (ours, others))

    def figure(some: Some) -> float:
        return first(some) - second(some)

    return Measured(figure(None), bootstrap(len(ours), figure))


def chosen(asked: Sequence[str], kinds: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The figures to be made.

    Arguments:
        asked: names that were given; default: what is meant without any.
        kinds: of the results that this run and these options give.

    Raises:
        UsageError: a name that is unknown, or that these results do not give.
    """
    accepted = [name for name, metric in METRICS.items() if set(metric.kinds) & set(kinds)]
    for name in asked:
        if name not in accepted:
            needed = _NEEDS.get(METRICS[name].kinds[0]) if name in METRICS else None
            if needed is not None:
                raise UsageError(f"--metrics has {name}, which needs {needed}")
            raise unknown_name("--metrics", name, accepted)
    return tuple(dict.fromkeys(asked or default))


_NEEDS = {CHOICES: "--choice or --choices-field", ANSWERS: "answers that a language model writes"}


def _column(results: Sequence[Result], name: str, dtype: type) -> np.ndarray:
    return np.array([result[name] for result in results], dtype)


def _loss(results: Sequence[Result], labels: Sequence[str]) -> Figure:
    losses, targets = _column(results, "loss", float), _column(results, "targets", float)

    def figure(some: Some) -> float:
        if some is None:
            return mean_loss(losses, targets)
        return float(losses[some].sum() / max(1.0, targets[some].sum()))

    return figure


def _perplexity(results: Sequence[Result], labels: Sequence[str]) -> Figure:
    loss = _loss(results, labels)
    return lambda some: perplexity(loss(some))


def _of_classes(make: Callable[[np.ndarray], float]) -> Callable[[Sequence[Result], Sequence[str]], Figure]:
    def of(results: Sequence[Result], labels: Sequence[str]) -> Figure:
        true, predicted = _column(results, "label", int), _column(results, "predicted", int)
        count = max(len(labels), 1)

        def figure(some: Some) -> float:
            return make(classes.confusion(true[_all(some)], predicted[_all(some)], count))

        return figure

    return of


def _correlated(
    make: Callable[[np.ndarray, np.ndarray], float], name: str
) -> Callable[[Sequence[Result], Sequence[str]], Figure]:
    def of(results: Sequence[Result], labels: Sequence[str]) -> Figure:
        values = _numbers(labels, name)
        true, predicted = (values[_column(results, key, int)] for key in ("label", "predicted"))
        return lambda some: make(true[_all(some)], predicted[_all(some)])

    return of


def _numbers(labels: Sequence[str], name: str) -> np.ndarray:
    try:
        return np.array([float(label) for label in labels])
    except ValueError as error:
        raise UsageError(
            f"--metrics has {name}, a correlation of numbers, and the labels are texts ({labels[0]!r}, ...); accepted with "
            "these: accuracy, f1, matthews"
        ) from error


def _share(hit: Callable[[Result], float]) -> Callable[[Sequence[Result], Sequence[str]], Figure]:
    def of(results: Sequence[Result], labels: Sequence[str]) -> Figure:
        hits = np.array([float(hit(result)) for result in results])
        return lambda some: math.fsum(hits[_all(some)]) / max(1, len(hits))

    return of


def _all(some: Some) -> Any:
    return slice(None) if some is None else some


def _is_likeliest(result: Result) -> bool:
    return int(np.argmax(result["log_likelihoods"])) == result["right"]


def _is_likeliest_by_length(result: Result) -> bool:
    of_each = np.array(result["log_likelihoods"]) / np.maximum(np.array(result["lengths"], float), 1.0)
    return int(np.argmax(of_each)) == result["right"]


METRICS: dict[str, Metric] = {
    "loss": Metric((LIKELIHOOD, CLASSES), _loss),
    "perplexity": Metric((LIKELIHOOD,), _perplexity),
    "accuracy": Metric((CLASSES,), _of_classes(classes.accuracy), is_share=True),
    "f1": Metric((CLASSES,), _of_classes(classes.f1)),
    "matthews": Metric((CLASSES,), _of_classes(classes.matthews)),
    "pearson": Metric((CLASSES,), _correlated(correlation.pearson, "pearson")),
    "spearman": Metric((CLASSES,), _correlated(correlation.spearman, "spearman")),
    "choice_accuracy": Metric((CHOICES,), _share(_is_likeliest), is_share=True),
    "choice_accuracy_norm": Metric((CHOICES,), _share(_is_likeliest_by_length), is_share=True),
    "exact_match": Metric((ANSWERS,), _share(lambda r: answers.exact_match(r["answer"], r["wanted"])), is_share=True),
    "token_f1": Metric((ANSWERS,), _share(lambda r: answers.token_f1(r["answer"], r["wanted"]))),
}
