"""accelerate's trackers (`accelerate.tracking`), each told where and as what a run is kept. Local: rank 0 alone.

The one file that knows accelerate, which is imported when the first tracker is made. Read in 1.15: a tracker is made by its
name, begun by `start`, and works without an `Accelerator` where `main_process_only` is false; but its log lines go through
accelerate's own adapter, which raises where no process state of accelerate was made, so the module gets a logger that needs none.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_subspace.atomic_files import write_json_atomic
from dist_subspace.run_folder.folder import RunFolder

Arguments = dict[str, Any]
_PROJECT = "dist_subspace"  # of a tracker that wants one, where its environment variable names none


class Tracked:
    """One tracker of a run. A run that goes on after the last step that the tracker was sent is the same run there; one that was
    killed beyond its checkpoint is another of the same name, as steps that were sent cannot be taken back. TensorBoard can:
    events beyond `resume_step` are hidden, and the curve has no second branch.

    Arguments:
        name: of accelerate's. config: nested mappings of plain values. resume_step: the step that the run continues after, or 0.
    """

    def __init__(self, name: str, run: RunFolder, config: Mapping[str, Any], resume_step: int) -> None:
        self._name, self._run, self._last = name, run, resume_step
        known = _known_runs(run).get(name) or {}
        same = known.get("id") if resume_step and resume_step >= known.get("step", resume_step + 1) else None
        self._remember(None)
        self._tracker = _class_of(name)(**_ARGUMENTS[name](run, same, resume_step))
        self._tracker.main_process_only = False
        self._tracker.start()
        if not resume_step:  # MLflow refuses a value that another start of the run has changed
            self._tracker.store_init_configuration(dict(flat(config)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)
        self._last = max(self._last, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        """Send a PNG."""
        _SEND_PICTURE[self._name](self._tracker, name, file, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Send some lines of Markdown."""
        _SEND_TEXT.get(self._name, _text)(self._tracker, name, text, step)

    def close(self) -> None:
        identity = _IDENTITY.get(self._name)
        with suppress(AttributeError):
            self._remember(None if identity is None else identity(self._tracker.tracker))
        self._tracker.finish()

    def _remember(self, identity: str | None) -> None:
        """Which run of the tracker's this is, and its last step; nothing while it is open."""
        known = _known_runs(self._run)
        entry = {} if identity is None else {self._name: {"id": identity, "step": self._last}}
        others = {name: said for name, said in known.items() if name != self._name}
        if others | entry != known:
            write_json_atomic(self._run.trackers, others | entry)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Dotted names, and values that every tracker takes: null and lists are text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if plain else json.dumps(value, default=str)


def _class_of(name: str) -> Any:
    from accelerate import tracking
    from transformers import logging

    tracking.logger = logging.get_logger(tracking.__name__)
    return tracking.LOGGER_TYPE_TO_CLASS[name]


def _known_runs(run: RunFolder) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(run.trackers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: said for name, said in known.items() if isinstance(said, dict)} if isinstance(known, dict) else {}


def _tensorboard(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    hidden = {"purge_step": resume_step + 1} if resume_step else {}
    return {"run_name": run.tensorboard.name, "logging_dir": str(run.path), **hidden}


def _wandb(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    """Project, entity and mode come from its own environment variables."""
    again = {"id": same, "resume": "allow"} if same else {}
    return {"run_name": None, "dir": str(run), "name": run.path.name, "group": run.path.name, **again}


def _mlflow(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    """Server and experiment come from its own environment variables; its own default is the experiment `Default`."""
    experiment = "Default"
    if (number := os.environ.get("MLFLOW_EXPERIMENT_ID")) is not None:
        import mlflow

        experiment = mlflow.get_experiment(number).name
    return {"experiment_name": experiment, "run_name": run.path.name, "run_id": same}


def _comet(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    return {"run_name": None, **({"experiment_key": same} if same else {})}


def _aim(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    return {"run_name": run.path.name, "logging_dir": str(run), **({"run_hash": same} if same else {})}


def _clearml(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    return {"run_name": run.path.name, **({"continue_last_task": same} if same else {})}


def _dvclive(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    return {"dir": str(run.path / "dvclive"), "resume": bool(resume_step), "dvcyaml": None, "save_dvc_exp": False}


def _swanlab(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    again = {"id": same, "resume": "allow"} if same else {}
    project = os.environ.get("SWANLAB_PROJ_NAME", _PROJECT)
    return {"run_name": project, "name": run.path.name, "log_dir": str(run.path / "swanlog"), **again}


def _trackio(run: RunFolder, same: str | None, resume_step: int) -> Arguments:
    return {
        "run_name": os.environ.get("TRACKIO_PROJECT", _PROJECT),
        "name": run.path.name,
        "resume": "must" if same else "never",
    }


_ARGUMENTS: Mapping[str, Callable[[RunFolder, str | None, int], Arguments]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "comet_ml": _comet,
    "aim": _aim,
    "clearml": _clearml,
    "dvclive": _dvclive,
    "swanlab": _swanlab,
    "trackio": _trackio,
}
# By what a tracker finds a run of its own again.
_IDENTITY: Mapping[str, Callable[[Any], str]] = {
    "wandb": lambda run: str(run.id),
    "mlflow": lambda run: str(run.info.run_id),
    "comet_ml": lambda experiment: str(experiment.get_key()),
    "aim": lambda run: str(run.hash),
    "clearml": lambda task: str(task.id),
    "swanlab": lambda run: str(run.id),
    "trackio": lambda run: str(run.name),
}


def _pixels(file: Path) -> Any:
    """`(height, width, 3)`, uint8."""
    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(file).convert("RGB"))


def _trackio_picture(tracker: Any, name: str, file: Path, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(str(file))}, step=step)


_SEND_PICTURE: Mapping[str, Callable[[Any, str, Path, int], None]] = {
    "tensorboard": lambda tracker, name, file, step: tracker.log_images(
        {name: _pixels(file)[None]}, step=step, dataformats="NHWC"
    ),
    "wandb": lambda tracker, name, file, step: tracker.log_images({name: [_pixels(file)]}, step=step),
    "swanlab": lambda tracker, name, file, step: tracker.log_images({name: [_pixels(file)]}, step=step),
    "aim": lambda tracker, name, file, step: tracker.log_images({name: _pixels(file)}, step=step),
    "clearml": lambda tracker, name, file, step: tracker.log_images({name: _pixels(file)}, step=step),
    "mlflow": lambda tracker, name, file, step: tracker.log_artifact(str(file), "pictures"),
    "comet_ml": lambda tracker, name, file, step: tracker.tracker.log_image(str(file), name=name, step=step),
    "dvclive": lambda tracker, name, file, step: tracker.tracker.log_image(file.name, str(file)),
    "trackio": _trackio_picture,
}


def _text(tracker: Any, name: str, text: str, step: int) -> None:
    tracker.log({name: text}, step=step)


def _wandb_text(tracker: Any, name: str, text: str, step: int) -> None:
    import wandb

    tracker.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)


def _swanlab_text(tracker: Any, name: str, text: str, step: int) -> None:
    import swanlab

    tracker.log({name: swanlab.Text(text)}, step=step)


def _aim_text(tracker: Any, name: str, text: str, step: int) -> None:
    import aim

    tracker.tracker.track(aim.Text(text), name=name, step=step)


def _mlflow_text(tracker: Any, name: str, text: str, step: int) -> None:
    import mlflow

    mlflow.log_text(text, f"{name}/step-{step}.md")


# The others take a text as one of their values.
_SEND_TEXT: Mapping[str, Callable[[Any, str, str, int], None]] = {
    "wandb": _wandb_text,
    "mlflow": _mlflow_text,
    "aim": _aim_text,
    "swanlab": _swanlab_text,
    "comet_ml": lambda tracker, name, text, step: tracker.tracker.log_text(text, step=step, metadata={"name": name}),
    "clearml": lambda tracker, name, text, step: tracker.tracker.get_logger().report_text(
        f"{name}, step {step}: {text}"
    ),
}
