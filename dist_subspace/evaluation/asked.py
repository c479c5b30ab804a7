"""What the command line asks of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.evaluation.choices import AskedChoices
from dist_subspace.evaluation.figures import ANSWERS, CHOICES, CLASSES, LIKELIHOOD, METRICS, chosen
from dist_subspace.metrics.answers import answer_pattern

_KINDS = {"classification": (CLASSES,), "text": (LIKELIHOOD,)}
_DEFAULTS = {
    CLASSES: ("loss", "accuracy", "f1", "matthews"),
    LIKELIHOOD: ("loss", "perplexity"),
    CHOICES: ("choice_accuracy", "choice_accuracy_norm"),
    ANSWERS: ("exact_match", "token_f1"),
}


@dataclass(frozen=True)
class Asked:
    """target: a configuration, a run or an adapter; base: a model alone; data: in the place of `data.eval`; metrics: names,
    empty for those that suit the task; limit: the first samples alone; predictions: a file for every result; output: a file
    for the figures; tasks: of lm-evaluation-harness, in the place of everything that needs data."""

    target: str | None = None
    overrides: Sequence[str] = ()
    base: str | None = None
    data: str | None = None
    metrics: tuple[str, ...] = ()
    choices: AskedChoices = field(default_factory=AskedChoices)
    answer_regex: str | None = None
    max_new_tokens: int = 256
    batch_size: int | None = None
    limit: int | None = None
    compare_base: bool = False
    predictions: str | None = None
    as_json: bool = False
    output: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_folder: str | None = None
    num_fewshot: int | None = None

    def check(self) -> None:
        """Local: what needs no file.

        Raises:
            UsageError: options that contradict each other, or values out of their range.
        """
        for name, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; accepted: a whole number of at least 1")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {self.max_new_tokens}; accepted: a whole number of at least 1")
        if self.choices.texts and self.choices.field is not None:
            raise UsageError("both --choice and --choices-field are given; accepted: one of them")
        if len(self.choices.texts) == 1:
            raise UsageError(
                f"--choice is given once ({self.choices.texts[0]!r}); accepted: once for each of two or more"
            )
        if self.choices.answer_field is not None and not self.choices.any:
            raise UsageError("--answer-field is given without choices; accepted: beside --choice or --choices-field")
        if self.answer_regex is not None:
            answer_pattern(self.answer_regex)
        if self.compare_base and self.base is not None:
            raise UsageError("--compare-base is given with --base, which has no adapter; accepted: one of them")
        if self.tasks:
            self._check_tasks()
        elif self.tasks_folder is not None or self.num_fewshot is not None:
            raise UsageError("--tasks-folder and --num-fewshot are of --tasks, which is not given")

    def _check_tasks(self) -> None:
        others = {
            "--data": self.data,
            "--metrics": self.metrics,
            "--choice": self.choices.texts,
            "--choices-field": self.choices.field,
            "--answer-regex": self.answer_regex,
            "--predictions": self.predictions,
        }
        for name, value in others.items():
            if value:
                raise UsageError(
                    f"--tasks and {name} are given; accepted: one of them (a task has its own data and figures)"
                )

    def metrics_for(self, config: Config) -> tuple[str, ...]:
        """The figures that are made of this data.

        Raises:
            UsageError: an unknown name, or one that this task does not give.
        """
        kinds = [*_KINDS.get(config.data.format, (LIKELIHOOD, ANSWERS)), *([CHOICES] if self.choices.any else [])]
        default = list(_DEFAULTS[kinds[0]])
        if self.choices.any:
            default += _DEFAULTS[CHOICES]
        if self.answer_regex is not None and ANSWERS in kinds:
            default += _DEFAULTS[ANSWERS]
        return chosen(self.metrics, kinds, default)

    def needs(self, metrics: Sequence[str], *kinds: str) -> bool:
        """Whether one of the figures is made of results of these kinds."""
        return any(set(METRICS[name].kinds) & set(kinds) for name in metrics)
