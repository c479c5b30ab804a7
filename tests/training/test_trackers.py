"""Trackers get the figures; a tracker that fails is reported once and never ends a run."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.records import Evaluation
from dist_subspace.training.tracked import flat
from dist_subspace.training.trackers import KINDS, Trackers, check_installed
from tests.step_records import unknown_record
from tests.whole_runs import scalars


def test_the_trackers_are_those_that_accelerate_has() -> None:
    assert set(KINDS) == set(LOGGER_TYPE_TO_CLASS)


def test_a_configuration_is_plain_values_by_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": None, "d": {"e": [1, "x"]}, "f": {}}, "g": True}
    assert dict(flat(nested)) == {"a.b": 1, "a.c": "null", "a.d.e": '[1, "x"]', "a.f": "{}", "g": True}


def test_tensorboard_gets_the_configuration_and_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "loss.png")
    trackers = Trackers(["tensorboard"], tmp_path, {"model": {"storage": "nf4", "dtype": None}}, no_report)
    trackers.picture("loss", tmp_path / "loss.png", 3)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("pictures/loss")
    assert (image.step, image.width, image.height) == (3, 6, 4)
    (written,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text()) == {"model.storage": "nf4", "model.dtype": "null"}


def no_report(message: str) -> None:
    raise AssertionError(message)


def test_tensorboard_gets_training_and_evaluation_and_no_nan(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, {"a": 1}, no_report)
    trackers.log(unknown_record(1, loss=2.0, learning_rate=0.5))
    trackers.log(unknown_record(2))
    trackers.log(Evaluation(2, {"eval_loss": 3.0}))
    trackers.close()
    assert scalars(tmp_path) == {"train/loss": [(1, 2.0)], "train/learning_rate": [(1, 0.5)], "eval/loss": [(2, 3.0)]}


def test_a_resumed_run_has_one_branch_in_tensorboard(tmp_path: Path) -> None:
    """Files are read in the order of their names: the second of the start, the process, and how many it has made (9, then 10)."""
    for resume, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):
        time.sleep(1 - time.time() % 1)  # runs do not resume within a second, and two numbers are no order
        trackers = Trackers(["tensorboard"], tmp_path, {}, no_report, resume_step=resume)
        for step in steps:
            trackers.log(unknown_record(step, loss=float(step + resume)))
        trackers.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_a_tracker_that_fails_in_the_middle_is_said_once_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = Trackers(["tensorboard"], tmp_path, {}, said.append)
    trackers.log(unknown_record(1, loss=1.0))
    assert trackers.active == ("tensorboard",) and said == []
    for _ in range(3):
        trackers.log(replace(unknown_record(1, loss=1.0), step="no step"))
    trackers.close()
    assert len(said) == 1 and "tensorboard failed" in said[0] and trackers.active == ()


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said: list[str] = []
    trackers = Trackers(["tensorboard"], tmp_path, {}, said.append)
    trackers.log(unknown_record(1, loss=1.0))
    trackers.close()
    assert len(said) == 1 and trackers.active == ()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(UsageError, match=rf"run\.report_to names '{name}'.*pip install 'dist-subspace\[{name}\]'"):
        check_installed([name])
    check_installed(["tensorboard"])


def test_wandb_gets_figures_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Trackers(["wandb"], tmp_path, {"model": {"storage": "nf4"}}, no_report)
    trackers.log(unknown_record(1, loss=1.0))
    trackers.log(Evaluation(1, {"eval_loss": 1.0}))
    trackers.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


# What lets a tracker work without a server.
OFFLINE = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    "comet_ml": {"COMET_START_ONLINE": "0", "COMET_API_KEY": "x" * 24},
    "clearml": {"CLEARML_OFFLINE_MODE": "1"},
    "swanlab": {"SWANLAB_MODE": "local"},
    "dvclive": {"DVC_NO_ANALYTICS": "1"},
    "trackio": {},
    "mlflow": {},
    "aim": {},
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_tracker_takes_figures_and_the_picture_of_a_run_that_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real package, where it is installed."""
    monkeypatch.chdir(tmp_path)
    for variable, value in (OFFLINE[name] | {"TRACKIO_DIR": str(tmp_path / "trackio")}).items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name, reason=f"{name} is not installed")  # which may read them when it is imported
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "loss.png")
    for resume, steps in ((0, (1, 2)), (2, (3, 4))):
        trackers = Trackers(
            [name], tmp_path, {"model": {"storage": "nf4", "dtype": None}}, no_report, resume_step=resume
        )
        for step in steps:
            trackers.log(unknown_record(step, loss=1.0))
            trackers.log(Evaluation(step, {"eval_loss": 2.0}))
        trackers.picture("loss", tmp_path / "loss.png", steps[-1])
        assert trackers.active == (name,)
        trackers.close()


def test_mlflow_goes_on_with_the_run_that_was_told_all_steps_and_begins_another_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was sent cannot be taken back: steps 3 and 4 would stand there twice."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    for resume, steps, is_killed in ((0, (1, 2), False), (2, (3, 4), True), (2, (3, 4), False)):
        trackers = Trackers(["mlflow"], tmp_path, {"max_steps": 4 + resume}, no_report, resume_step=resume)
        for step in steps:
            trackers.log(unknown_record(step, loss=float(step)))
        mlflow.end_run() if is_killed else trackers.close()
    runs = mlflow.search_runs(output_format="list", search_all_experiments=True)
    told = [[m.step for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")] for run in runs]
    assert sorted(told) == [[1, 2, 3, 4], [3, 4]] and {run.info.run_name for run in runs} == {tmp_path.name}


def test_mlflow_gets_figures_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    trackers = Trackers(["mlflow"], tmp_path, {"model": {"storage": "nf4"}}, no_report)
    trackers.log(unknown_record(3, loss=1.5))
    trackers.close()
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert run.data.params == {"model.storage": "nf4"} and run.data.metrics == {"train/loss": 1.5}
