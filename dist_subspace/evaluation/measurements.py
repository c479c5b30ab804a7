"""The measurements of one model: each is a number of samples whose results are made in blocks, over all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dist_subspace.evaluation.choices import Choices, choice_results, last_run
from dist_subspace.evaluation.figures import ANSWERS, CHOICES, CLASSES, LIKELIHOOD
from dist_subspace.evaluation.samples import Samples
from dist_subspace.evaluation.scoring import Batching, heed, scores
from dist_subspace.generation.answers import answered
from dist_subspace.metrics.answers import extracted

BLOCK = 256
"""Samples that are measured together: those of like length share a micro-batch, and a file of predictions gets a block at a
time. Whatever the ranks are, so that a block's results are."""


class Measurement(Protocol):
    """kind: of the results, as figures.py names them; the length: how many there are."""

    @property
    def kind(self) -> str: ...

    def __len__(self) -> int: ...

    def results(self, model: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Collective: of these samples, in their order, on every rank."""


@dataclass(frozen=True)
class OfSamples:
    """Loss of each sample, and its class where samples are classified, with the classes' names."""

    samples: Samples
    how: Batching
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return CLASSES if self.samples.table.classification else LIKELIHOOD

    def __len__(self) -> int:
        return len(self.samples.table)

    def results(self, model: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
        records = self.samples.records
        found = []
        for number, score in zip(numbers, scores(model, self.samples.table, numbers, self.how), strict=True):
            result: dict[str, Any] = {"record": int(records[number]), "loss": score.loss, "targets": score.targets}
            if score.predicted is not None:
                label = int(self.samples.table.sample(number)[1][0])
                result |= {"label": label, "predicted": score.predicted}
                if self.labels:
                    result |= {"label_text": self.labels[label], "predicted_text": self.labels[score.predicted]}
            found.append(result)
        return found


@dataclass(frozen=True)
class OfChoices:
    """The likelihood of each choice of a question."""

    choices: Choices
    how: Batching
    kind: str = CHOICES

    def __len__(self) -> int:
        return len(self.choices)

    def results(self, model: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
        first = self.choices.first
        spans = [range(int(first[number]), int(first[number + 1])) for number in numbers]
        found = scores(model, self.choices.table, [place for span in spans for place in span], self.how)
        losses = iter(score.loss for score in found)
        return [
            {"record": int(self.choices.records[number])}
            | choice_results(self.choices, number, [next(losses) for _ in span])
            for number, span in zip(numbers, spans, strict=True)
        ]


@dataclass(frozen=True)
class OfAnswers:
    """An answer, written greedily, beside the sample's own: of a conversation the last one.

    generation: transformers' settings for a model; pattern: finds the answer in both texts.
    """

    samples: Samples
    tokenizer: Any
    generation: Callable[[Any], Any]
    pattern: re.Pattern[str] | None
    batch_size: int
    kind: str = ANSWERS

    def __len__(self) -> int:
        return len(self.samples.table)

    def results(self, model: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
        parts = [prompt_and_answer(*self.samples.trained(number)) for number in numbers]
        # Neighbours share a batch: prompts of like length.
        order = sorted(range(len(parts)), key=lambda place: (-len(parts[place][0]), place))
        prompts = [parts[place][0].tolist() for place in order]
        made: list[str] = []
        for some in answered(model, self.tokenizer, prompts, self.generation(model), self.batch_size):
            made += [answer.text for (answer,) in some]
            heed()
        texts = dict(zip(order, made, strict=True))
        records = self.samples.records
        return [
            {
                "record": int(records[number]),
                "wanted": extracted(self._text(parts[place][1]), self.pattern),
                "answer": extracted(texts[place], self.pattern),
                "text": texts[place],
            }
            for place, number in enumerate(numbers)
        ]

    def _text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_and_answer(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample's ids up to its last answer, and those of that answer."""
    places = np.flatnonzero(last_run(trained))
    return ids[: places[0]], ids[places[0] : places[-1] + 1]


def blocks(count: int, first: int = 0) -> list[range]:
    """The numbers of `count` samples from the first on, where a block begins, a block at a time."""
    return [range(start, min(start + BLOCK, count)) for start in range(first, count, BLOCK)]
