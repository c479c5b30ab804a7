"""Experiment trackers of `run.report_to`: accelerate's. Local: rank 0 alone. A tracker is a convenience: its failure never ends
a run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

from dist_subspace.config.names import Reporter
from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.records import EVALUATED, Evaluation, StepRecord
from dist_subspace.training.samples import Sample
from dist_subspace.training.tracked import Tracked

_EXTRAS = ("wandb", "mlflow")  # those that setup.cfg has a version for


class Tracker(Protocol):
    """One place that figures are sent to."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, file: Path, step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


KINDS: dict[str, Callable[[RunFolder, Mapping[str, Any], int], Tracker]] = {
    name: partial(Tracked, name) for name in get_args(Reporter)
}


def check_installed(names: Sequence[str]) -> None:
    """Each tracker has the package that is called like it.

    Raises:
        UsageError: a package is not installed; says what installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"run.report_to names {name!r}, whose package is not installed; accepted after "
                f"pip install {_requirement(name)!r}, or without it: {[n for n in names if n != name] or ['none']}"
            )


class Trackers:
    """All trackers of a run. One that fails, at its start or later, is reported once and left out from then on.

    Args:
        names: `run.report_to`.
        run_dir: RUN; its name is the run's name.
        config: the resolved configuration, nested mappings of plain values.
        report: where a tracker's failure is said (`Display.warning`).
        resume_step: the step that the run continues after, else 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: StrPath,
        config: Mapping[str, Any],
        report: Callable[[str], None],
        resume_step: int = 0,
    ) -> None:
        self._report = report
        self._active: dict[str, Tracker] = {}
        for name in names:
            try:
                self._active[name] = KINDS[name](RunFolder(run_dir), config, resume_step)
            except Exception as error:
                self._dropped(name, error)

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(self._active)

    def log(self, record: StepRecord | Evaluation) -> None:
        """Send what metrics.jsonl gets: `loss` becomes `train/loss`, `eval_loss` `eval/loss`; no number, no point."""
        line = record.as_line()
        values = {_tag(key): float(value) for key, value in line.items() if key != "step" and _is_number(value)}
        if values:
            self._each(lambda tracker: tracker.log(values, record.step))

    def samples(self, samples: Sequence[Sample]) -> None:
        """Answers to prompts, as one text a step."""
        for step in sorted({sample.step for sample in samples}):
            told = [f"**{sample.prompt}**\n\n{sample.answer}" for sample in samples if sample.step == step]
            self._each(partial(_tell, text="\n\n---\n\n".join(told), step=step))

    def picture(self, name: str, file: Path, step: int) -> None:
        """Send a PNG, as `pictures/<name>`."""
        self._each(lambda tracker: tracker.picture(f"pictures/{name}", file, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._active.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._active[name]
                self._dropped(name, error)

    def _dropped(self, name: str, error: Exception) -> None:
        said = " ".join(str(error).split())
        self._report(f"{name} failed and gets no more figures of this run ({type(error).__name__}: {said})")


def _tell(tracker: Tracker, text: str, step: int) -> None:
    tracker.text("samples", text, step)


def _requirement(name: str) -> str:
    return f"dist-subspace[{name}]" if name in _EXTRAS else name


def _tag(key: str) -> str:
    return f"eval/{key.removeprefix(EVALUATED)}" if key.startswith(EVALUATED) else f"train/{key}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
