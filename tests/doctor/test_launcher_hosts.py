"""The host of a rank that never came, by the launcher's own list."""

from __future__ import annotations

import base64
import json

from dist_subspace.doctor.launcher_hosts import expected_host, of_deepspeed, of_slurm


def test_deepspeeds_command_line_lists_the_slots_of_each_host() -> None:
    coded = base64.urlsafe_b64encode(json.dumps({"node1": [0, 1], "node2": [0]}).encode()).decode()
    command = ["python", "-m", "deepspeed.launcher.launch", f"--world_info={coded}", "train.py"]
    assert of_deepspeed(command) == ["node1", "node1", "node2"]
    assert of_deepspeed(["python", "train.py"]) == of_deepspeed(["python", "--world_info=???"]) == []


def test_slurms_lists_give_the_host_of_each_task() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node1,node2", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert of_slurm(step) == ["node1", "node1", "node2"]
    assert expected_host(2, step) == "node2" and expected_host(3, step) is None
    assert of_slurm({"SLURM_JOB_NODELIST": "node1"}) == []
