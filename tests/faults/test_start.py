"""A run starts on a machine without a C++ compiler, beside what a killed start left, and says what it does."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.faults.launched import launched, write_config

PROGRAMS = ("bash", "sh", "env", "uname", "grep", "cat", "ls", "lscpu", "numactl", "nvidia-smi")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment without compilers, whose folder of compiled extensions has the locks that killed builds leave."""
    programs, extensions = tmp_path / "programs", tmp_path / "extensions"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    for name in PROGRAMS:
        if (found := shutil.which(name)) is not None:
            (programs / name).symlink_to(found)
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam"):
        for folder in (extensions / name, extensions / f"py{sys.version_info[0]}{sys.version_info[1]}_cpu" / name):
            folder.mkdir(parents=True)
            (folder / "lock").touch()
    return {"PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(extensions), "CC": "", "CXX": ""}


def short(folder: Path, **sections: dict[str, object]) -> Path:
    training = {"max_steps": 2, "global_batch_size": 4}
    return write_config(folder, 20, training=training, **sections)


@pytest.mark.parametrize("name", ["plain", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_run_starts_without_a_compiler_beside_the_locks_of_killed_builds(
    name: str, bare: dict[str, str], tmp_path: Path
) -> None:
    assert not any(
        shutil.which(program, path=bare["PATH"]) for program in ("cc", "gcc", "c++", "g++", "clang", "ninja")
    )
    with launched(name, short(tmp_path), **bare) as run:
        run.ended(300)
        assert run.process.returncode == 0, run.output()
        assert run.status()["state"] == "finished"
        first = next(
            line for line in run.output().splitlines() if line and not line.startswith("[20")
        )  # the launcher's
        assert first == "starting: importing the libraries"
    built = [file for file in Path(bare["TORCH_EXTENSIONS_DIR"]).rglob("*") if file.is_file() and file.name != "lock"]
    assert built == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero2-offload", "zero3-offload"])
def test_no_preset_but_that_of_nvme_needs_a_compiler(preset: str, bare: dict[str, str], tmp_path: Path) -> None:
    with launched("torchrun", short(tmp_path, deepspeed={"preset": preset}), **bare) as run:
        run.ended(300)
        assert run.process.returncode == 0, run.output()


def test_nvme_without_a_compiler_is_refused_in_one_sentence_before_anything_is_loaded(
    bare: dict[str, str], tmp_path: Path
) -> None:
    config = short(tmp_path, deepspeed={"preset": "zero3-nvme", "nvme_path": str(tmp_path)})
    with launched("plain", config, **bare) as run:
        run.ended(300)
        assert run.process.returncode == 2, run.output()
        sentences = [line for line in run.output().splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1 and "a C++ compiler" in sentences[0] and "nvme" in sentences[0]
        assert "Traceback" not in run.output()


@pytest.mark.slow
def test_starts_that_are_killed_in_their_first_seconds_leave_nothing_that_a_later_one_waits_for(tmp_path: Path) -> None:
    """Each of five starts of all processes is killed a little later than the one before."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    config = short(tmp_path)
    for number in range(5):
        with launched("deepspeed", config, **environment) as run:
            time.sleep(2.0 * (number + 1))
            for process in run.all():
                process.send_signal(signal.SIGKILL)
    with launched("deepspeed", config, **environment) as run:
        run.ended(300)
        assert run.process.returncode == 0, run.output()
        assert run.status()["state"] == "finished"


@pytest.mark.slow
def test_a_trainer_that_is_made_before_anything_of_ours_is_called_does_not_wait_for_a_lock_either(
    bare: dict[str, str], tmp_path: Path
) -> None:
    short(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    with launched("plain", tmp_path / "config.yaml", script=script, **bare) as run:
        run.ended(300)
        assert run.process.returncode == 0, run.output()
        assert "the helper is None" in run.output()


SCRIPT = """
import os

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29377"}
from dist_subspace import SubspaceConfig, attach, load_frozen
from transformers import Trainer, TrainingArguments
zero = {"stage": 2}
batch = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1}
arguments = TrainingArguments(output_dir="out", max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
    save_strategy="no", deepspeed=batch | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False})
model = attach(load_frozen("model", storage="fp32"), SubspaceConfig(method="lora", rank=2)).train()
rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
Trainer(model=model, args=arguments, train_dataset=rows).train()
import deepspeed.comm
print("the helper is", deepspeed.comm.comm.cdb.shm_comm_op)
"""
