"""Where DeepSpeed cannot be installed: the Python API and a run of `deepspeed.preset: none` work, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port
from tests.tiny_run import make_model, make_records

# As if it were not installed: every import of DeepSpeed fails, and whoever looks for it finds nothing.
HIDDEN = """
import sys
from importlib.machinery import PathFinder

class WithoutDeepSpeed(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] == "deepspeed" else super().find_spec(fullname, path, target)

sys.meta_path[:] = [WithoutDeepSpeed if finder is PathFinder else finder for finder in sys.meta_path]
"""
INSTALLED = "import sys\n"
NOT_IMPORTED = "\nassert not [m for m in sys.modules if m.partition('.')[0] == 'deepspeed'], 'DeepSpeed was imported'\n"

COMMAND = "from dist_subspace.cli import main\nstatus = main(sys.argv[1:])\n"

API = """
import torch, dist_subspace as dsub
base = dsub.load_frozen(FOLDER + "/model", storage="nf4", dtype="float32")
model = dsub.attach(base, dsub.SubspaceConfig(method=METHOD, rank=2))
optimizer = torch.optim.AdamW(dsub.parameter_groups(model, 1e-2, 0.1))
ids = torch.arange(12).view(2, 6)
for step in (1, 2, 3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    dsub.advance(model, step, 3)
    optimizer.zero_grad()
dsub.summary(model)
before = model.eval()(input_ids=ids).logits
dsub.save_adapter(model, OUT + "/adapter")
again = dsub.load_adapter(dsub.load_frozen(FOLDER + "/model", storage="nf4", dtype="float32"), OUT + "/adapter").eval()
assert torch.equal(again(input_ids=ids).logits, before)
dsub.merge(model, OUT + "/merged")
dsub.export_peft(model, OUT + "/peft")
dsub.import_peft(dsub.load_frozen(FOLDER + "/model", storage="nf4", dtype="float32"), OUT + "/peft")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_records(path / "train.jsonl", 60)
    return path


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with arguments as the command line would have them."""
    plain = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def settings(folder: Path, run: Path, **changes: str) -> list[str]:
    lines = {
        **{"model.path": folder / "model", "model.storage": "nf4", "model.dtype": "float32", "subspace.method": "lora"},
        **{"data.train": folder / "train.jsonl", "data.max_length": 48, "data.packing": "false"},
        **{"training.max_steps": 4, "training.global_batch_size": 4, "training.per_device_train_batch_size": 2},
        **{"checkpoint.save_steps": 2, "run.output_dir": run, "run.report_to": "none", "run.logging_steps": 1},
    }
    return [f"{key}={value}" for key, value in (lines | changes).items()]


def recipe(folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_text("model: {}\ndata: {}\n")
    return str(file)


@pytest.mark.parametrize("there", [HIDDEN, INSTALLED], ids=["absent", "present"])
def test_a_run_and_a_merge_on_the_command_line_never_import_deepspeed(there: str, folder: Path, tmp_path: Path) -> None:
    command = there + COMMAND + NOT_IMPORTED + "sys.exit(status)"
    run = tmp_path / "run"
    trained = python(command, "train", recipe(folder), *settings(folder, run, **{"deepspeed.preset": "none"}))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "checkpoint-4" / "optimizer.safetensors").is_file()
    merged = python(command, "merge", str(run / "adapter"), str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "adalora"])
def test_the_python_interface_works_without_deepspeed(method: str, folder: Path, tmp_path: Path) -> None:
    values = f"FOLDER, OUT, METHOD = {str(folder)!r}, {str(tmp_path)!r}, {method!r}\n"
    told = {"lora": API, "adalora": API.replace("rank=2)", "rank=2, options={'warmup_steps': 0, 'final_steps': 1})")}
    ended = python(HIDDEN + values + told[method] + NOT_IMPORTED)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_another_preset_is_refused_where_deepspeed_cannot_be_imported_naming_none(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = python(HIDDEN + COMMAND + "sys.exit(status)", "train", recipe(folder), *settings(folder, run))
    assert ended.returncode == 2, ended.stdout + ended.stderr
    message = json.loads((run / "status.json").read_text())["message"]
    assert message == (
        "deepspeed.preset is 'zero3', but DeepSpeed cannot be imported here (ModuleNotFoundError: No module named 'deepspeed'); "
        "accepted without it: deepspeed.preset none, on one process"
    )
    assert "Traceback" not in ended.stderr


def test_several_processes_without_deepspeed_are_refused_once(folder: Path, tmp_path: Path) -> None:
    """As torchrun starts them: rank 0 says it, and both leave with the status of a refusal."""
    code = HIDDEN + COMMAND + "sys.exit(status)"
    run = tmp_path / "run"
    told = ["train", recipe(folder), *settings(folder, run, **{"deepspeed.preset": "none"})]
    port = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *told],
            cwd=ROOT,
            env=plain | port | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert sum("which trains on one process, but there are 2 ranks" in output for output in outputs) == 1, outputs
