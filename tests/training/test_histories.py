"""What lies in a run's folder is never lost: to a run that continues something else, or to a second one beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_subspace import load_adapter, load_frozen
from dist_subspace.checkpoint import occupancy
from dist_subspace.placement.collectives import barrier, world
from dist_subspace.run_folder.manifest import verify
from dist_subspace.run_folder.status import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, read_status, write_status
from dist_subspace.training import model
from dist_subspace.training.run_status import RunStatus
from tests.ranks import ROOT, run_on_ranks
from tests.tiny_run import make_model
from tests.whole_runs import configuration, losses, run_here


def finished(folder: Path, run: Path, **subspace: Any) -> dict[str, Any]:
    """A run of six steps with three checkpoints."""
    config = configuration(folder, run, global_batch_size=4)
    config["checkpoint"] = {"save_steps": 2, "save_total_limit": 3}
    config["subspace"] |= subspace
    assert run_here(config) == EXIT_OK
    return config


def digests(run: Path) -> dict[str, str]:
    """What vouches for each checkpoint, wherever below the folder it lies."""
    return {path.parent.name: path.read_text() for path in run.rglob("MANIFEST.json")}


def set_aside(run: Path) -> Path:
    (found,) = run.glob("set-aside-*")
    return found


@pytest.mark.parametrize(
    ("resume", "ranks", "kept"),
    [("checkpoint-2", 2, {2}), ("none", 1, set()), ("damaged", 1, {2, 4})],
)
def test_newer_checkpoints_survive_a_run_that_does_not_continue_them(
    resume: str, ranks: int, kept: set[int], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = finished(folder, run)
    before, curve = digests(run), losses(run)
    if resume == "damaged":
        (run / "checkpoint-6" / "trainer_state.json").write_text("{}")
    else:
        config["checkpoint"]["resume"] = str(run / resume) if resume != "none" else resume
    config["training"]["learning_rate"] = 0.02  # so that no step can pass for one of the former history
    done = [run_here(config)] if ranks == 1 else run_on_ranks(ranks, run_here, config)
    assert done == [EXIT_OK] * ranks
    aside = set_aside(run)
    assert aside.name.startswith(f"set-aside-{max(kept, default=0)}-")
    beyond = {f"checkpoint-{step}" for step in (2, 4, 6) if step not in kept}
    assert digests(aside) == {name: before[name] for name in beyond}
    assert losses(aside) == curve and (aside / "adapter" / "adapter_model.safetensors").exists()
    assert len(losses(run)) == 6 and losses(run)[-1] != curve[-1]
    assert verify(run / "checkpoint-6") is None and digests(run / "checkpoint-6") != before["checkpoint-6"]
    if ranks == 1:
        said = capfd.readouterr().out
        assert all(name in said for name in beyond) and str(aside) in said


def test_a_run_that_never_comes_to_its_first_step_moves_nothing(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = finished(folder, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    config["checkpoint"]["resume"] = "none"
    config["subspace"]["rank"] = 99  # more than the smallest layer has: refused once the model is there
    assert run_here(config) == EXIT_USAGE
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "status.json"} == before | {
        run / ".lock": before[run / ".lock"]
    }


@pytest.mark.parametrize("resume", ["none", "checkpoint-2"])
def test_a_run_that_is_stopped_before_it_has_moved_an_older_history_does_not_advise_to_go_on_with_that(
    resume: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = finished(folder, run)
    before = digests(run)
    with monkeypatch.context() as patch:
        told_in(model, "load_frozen", patch)
        config["checkpoint"]["resume"] = resume if resume == "none" else str(run / resume)
        assert run_here(config) == EXIT_INTERRUPTED
    assert (read_status(run) or {})["message"].endswith("; run the same command to continue") and digests(run) == before


def test_a_stop_while_a_run_takes_its_folder_is_written_into_its_status(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("_refuse_living", "write_status"):
        with monkeypatch.context() as patch:
            told_in(occupancy, place, patch)
            assert run_here(configuration(folder, tmp_path / "run")) == EXIT_INTERRUPTED
        assert (read_status(tmp_path / "run") or {})["state"] == "interrupted"


def told_in(place: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """This process gets a SIGTERM at the end of a function of ours."""
    function = getattr(place, name)

    def told(*arguments: Any, **named: Any) -> Any:
        value = function(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    patch.setattr(place, name, told)


def test_a_rank_that_outlives_its_run_does_not_write_into_the_status_of_the_next(tmp_path: Path) -> None:
    assert run_on_ranks(2, written_by_rank_1, str(tmp_path), False)[1] == ("failed", 1)
    assert run_on_ranks(2, written_by_rank_1, str(tmp_path), True)[1] == ("running", None)


def written_by_rank_1(run: str, another: bool) -> tuple[str, int | None]:
    """What stands there after rank 1's word, where by then the folder has another run or not."""
    status = RunStatus(run)
    status.take()
    if another and world().is_main:
        write_status(run, "running", host=socket.gethostname(), pid=1, heartbeat="")
    barrier()
    if world().rank == 1:
        status.write("failed", "of the former run", rank=1, anyone=True)
    found = read_status(run) or {}
    barrier()
    status.release()
    return found["state"], found["rank"]


def test_a_rank_that_does_not_see_the_run_s_folder_writes_no_word_there_and_makes_none(tmp_path: Path) -> None:
    """What it may find at that path is a copy of an older run, whose last word is one without a process."""
    write_status(tmp_path / "copy", "failed", "long ago", rank=1)
    for there in ("none", "copy"):
        folders = [str(tmp_path / f"run-{there}"), str(tmp_path / there)]
        assert run_on_ranks(2, written_elsewhere, folders) == [
            ("running", ""),
            (None if there == "none" else "failed", "long ago"),
        ]
    assert not (tmp_path / "none").exists()


def written_elsewhere(folders: list[str]) -> tuple[str | None, str]:
    """State and message in a rank's own folder after rank 1's word."""
    status = RunStatus(folders[world().rank])
    status.take()
    if world().rank == 1:
        status.write("failed", "a word", rank=1, anyone=True)
    found = read_status(folders[world().rank]) or {"state": None, "message": "long ago"}
    barrier()
    status.release()
    return found["state"], found["message"]


def test_what_was_set_aside_is_read_and_continued_by_name_with_the_factors_of_the_run(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = finished(folder, run, method="spectral-additive")
    former = load_file(run / "checkpoint-6" / "adapter_model.safetensors")
    config["checkpoint"]["resume"] = "none"
    config["training"]["max_steps"] = 2
    assert run_here(config) == EXIT_OK
    aside = set_aside(run) / "checkpoint-6"
    adapted = load_adapter(load_frozen(folder / "model", storage="fp32"), aside)
    assert adapted(input_ids=torch.arange(4, 12)[None]).logits.isfinite().all()
    config["checkpoint"]["resume"] = str(aside)
    config["training"]["max_steps"] = 6
    assert run_here(config) == EXIT_OK  # where no step is left to make
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in former.items())
    folders = sorted(path.name for path in run.glob("set-aside-*"))
    assert len(folders) == 2 and verify(aside) is None


def start(config: Path) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives_and_a_killed_one_is_continued_at_once(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=100_000, global_batch_size=4)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    first = start(tmp_path / "config.yaml")
    try:
        wait_for(run / "metrics.jsonl", first)
        before = (run / "config.yaml").read_text()
        assert run_on_ranks(2, run_here, config | {"training": {"max_steps": 7}}) == [EXIT_USAGE] * 2
        assert run_here(config) == EXIT_USAGE
        said = capfd.readouterr().err
        assert said.count("error: ") == 1 and f"run.output_dir is '{run}', where process {first.pid} on" in said
        assert (read_status(run) or {})["state"] == "running" and (run / "config.yaml").read_text() == before
        assert first.poll() is None
        wait_for(run / "checkpoint-3" / "MANIFEST.json", first)
        first.kill()
        first.wait()
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    newest = max(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))
    config["training"]["max_steps"] = newest + 1
    assert run_here(config) == EXIT_OK
    assert (read_status(run) or {})["step"] == newest + 1


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not file.exists() or not file.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)


def broken(folder: Path) -> Path:
    """A base with one number that is none, which every token meets."""
    make_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero3"])
def test_a_run_of_which_no_step_was_applied_fails_and_leaves_no_adapter(
    preset: str, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=3) | {"deepspeed": {"preset": preset}}
    config["model"]["path"] = str(broken(tmp_path / "model"))
    for _ in range(2):  # the second time no step is left to make
        assert run_on_ranks(2, run_here, config) == [1, 1]
        status = read_status(run) or {}
        assert status["state"] == "failed" and "3 of 3 steps were skipped" in status["message"] and status["step"] == 3
        assert not (run / "adapter").exists()


def test_a_rate_that_ruins_the_model_is_no_success_and_an_earlier_adapter_does_not_pass_for_its_end(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = finished(folder, run)
    config["training"] |= {"max_steps": 12, "learning_rate": 1e30, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    config["training"]["max_grad_norm"] = 0.0
    assert run_here(config) == 1
    status = read_status(run) or {}
    assert status["state"] == "failed" and "of 12 steps were skipped" in status["message"]
    assert not (run / "adapter").exists() and (set_aside(run) / "adapter" / "adapter_config.json").exists()


def test_a_run_that_diverges_says_so_on_the_screen_and_in_its_status(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = configuration(folder, run, max_steps=10, global_batch_size=4, learning_rate=3.0, warmup_steps=0)
    config["training"] |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    config["subspace"]["modules_to_save"] = ["lm_head"]
    config["run"]["logging_steps"] = 4
    assert run_here(config) == EXIT_OK
    status = read_status(run) or {}
    assert status["state"] == "finished" and "the run diverged" in status["warning"] and status["skipped"] == 0
    assert "warning: the run diverged" in capfd.readouterr().out
    config["training"]["max_steps"] = 11  # the first losses are those of metrics.jsonl now
    assert run_here(config) == EXIT_OK and "the run diverged" in str((read_status(run) or {})["warning"])
    good = configuration(folder, tmp_path / "good")
    assert run_here(good) == EXIT_OK and (read_status(tmp_path / "good") or {})["warning"] is None
