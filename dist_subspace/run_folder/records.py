"""The two kinds of lines in RUN/metrics.jsonl, typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EVALUATED = "eval_"  # what the keys of an evaluation begin with
_LEFT_OUT_IF_NONE = ("penalty",)


@dataclass(frozen=True)
class StepRecord:
    """A logged step, a training line. What is not known is None; a loss that was not finite is NaN, and null in the file.

    step, samples, tokens, elapsed_seconds: so far. loss: the mean over the steps since the line before. learning_rate,
    grad_norm: of this step. tokens_per_second: since the line before. peak_memory_bytes: of the largest rank. penalty: of the
    method's constraint, where it has one; it is no part of `loss`. figures: of an objective of preferences, means over the
    answers since the line before.
    """

    step: int
    epoch: float | None
    samples: int | None
    tokens: int | None
    loss: float
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    elapsed_seconds: float | None
    penalty: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_line(self) -> dict[str, Any]:
        """The line's keys and values, in the order of the fields; the objective's figures stand behind them, each by its name."""
        line = {k: v for k, v in asdict(self).items() if v is not None or k not in _LEFT_OUT_IF_NONE}
        return line | line.pop("figures")

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> StepRecord:
        """From a line with a step and a loss; values that are no numbers are not known."""
        names = [name for name in cls.__dataclass_fields__ if name != "figures"]
        known = {name: _number(line.get(name)) for name in names}
        loss = known.pop("loss")
        figures = {name: line[name] for name in line if name not in names and _number(line[name]) is not None}
        return cls(loss=math.nan if loss is None else float(loss), **known, figures=figures)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation line: the step, and what was measured, by keys that begin with `eval_`.

    Raises:
        ValueError: a key without `eval_`.
    """

    step: int
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        wrong = [key for key in self.values if not key.startswith(EVALUATED)]
        if wrong:
            raise ValueError(f"a line of an evaluation has keys that begin with {EVALUATED}; got {wrong}")

    @property
    def loss(self) -> float:
        """NaN where it was not finite, or not measured."""
        loss = _number(self.values.get("eval_loss"))
        return math.nan if loss is None else float(loss)

    @property
    def figures(self) -> dict[str, Any]:
        """The values by names for people: `eval_f1` is `f1`."""
        return {key.removeprefix(EVALUATED).replace("_", " "): value for key, value in self.values.items()}

    def as_line(self) -> dict[str, Any]:
        return {"step": self.step, **self.values}

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Evaluation:
        return cls(line["step"], {key: value for key, value in line.items() if key.startswith(EVALUATED)})


def _number(value: Any) -> Any:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
