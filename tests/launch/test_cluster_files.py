"""What a person copies for a cluster: short, valid by the tools and the models of those who read it, and without secrets in a
command line. (The scripts run on real launchers in tests/cluster.)"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ("deepspeed.sh", "torchrun.sh", "slurm.sbatch", "mpirun.sh")
FILES = (*SCRIPTS, "kubernetes.yaml", "skypilot.yaml", "Dockerfile", "hostfile.example")


@pytest.mark.parametrize("name", FILES)
def test_a_file_to_copy_is_short_and_says_first_what_to_change(name: str) -> None:
    lines = (LAUNCH / name).read_text().splitlines()
    assert len(lines) <= 50
    head = "\n".join(line for line in lines[:11] if line.startswith("#"))
    assert "Change" in head or "Copy" in head
    if name in SCRIPTS:
        assert lines[0] == "#!/usr/bin/env bash" and len(lines) <= 42


@pytest.mark.parametrize(
    ("program", "files"), [("shellcheck", ["-x", *SCRIPTS, "carried.sh"]), ("hadolint", ["Dockerfile"])]
)
def test_the_linters_find_nothing(program: str, files: list[str]) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (EXTRAS=cluster)")
    named = [file if file.startswith("-") else f"launch/{file}" for file in files]
    done = subprocess.run([program, *named], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_train_job_has_no_key_that_kubeflow_does_not_know() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api (EXTRAS=cluster)")
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    read = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None and read.to_dict() == job  # what it does not know it drops
    job["spec"]["trainer"]["numNode"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


def test_kubernetes_and_skypilot_start_what_is_there() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["trainer"]
    assert job["command"] == ["torchrun", "/opt/dist_subspace/launch/train.py"]
    assert "WORKDIR /opt/dist_subspace" in (LAUNCH / "Dockerfile").read_text()
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    for line in (task["setup"], task["run"]):
        done = subprocess.run(["bash", "-n"], input=line, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and not done.stderr
    assert all((LAUNCH / name).stat().st_mode & 0o111 for name in SCRIPTS if name.endswith(".sh"))


def test_what_is_carried_to_other_hosts_is_named_and_can_be_read_back(tmp_path: Path) -> None:
    given = {"HF_TOKEN": 'hf_it\'s a "secret"', "HF_HOME": "/data/a b", "DS_ACCELERATOR": "cpu", "INTERFACE": "eth7"}
    left = {"RANK": "0", "CUDA_VISIBLE_DEVICES": "1", "TORCHELASTIC_RUN_ID": "a", "OTHER": "x"}
    environment = {"PATH": os.environ["PATH"]} | given | left
    script = '. "$0"; carried; echo; carried_lines > "$1"; bash -c \'. "$0"; printf %s "$HF_TOKEN$HF_HOME"\' "$1"'
    command = [
        "env",
        "-u",
        "HF_HOME",
        "bash",
        "-c",
        f"export HF_HOME='/data/a b'; {script}",
        str(LAUNCH / "carried.sh"),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "lines")], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    names, _, read_back = done.stdout.partition("\n\n")
    wanted = {"HF_TOKEN", "HF_HOME", "DS_ACCELERATOR", "PATH", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert set(names.split()) == wanted
    assert read_back == given["HF_TOKEN"] + given["HF_HOME"]
    assert "export GLOO_SOCKET_IFNAME=eth7\n" in (tmp_path / "lines").read_text()
