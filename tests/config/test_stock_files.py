"""The DeepSpeed files of configs/deepspeed: the Hugging Face Trainer fills them in, and a run on two ranks has the engine that
they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.placement.collectives import world
from tests.config.headers import FOLDER
from tests.keys.bench import run_here
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model, make_records

FILES = sorted((FOLDER / "deepspeed").iterdir())
# name -> stage, whether the engine is in bfloat16, whether weights and optimizer lie in the machine's memory
ENGINES = {
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero3": (3, False, False),
    "zero3-bf16": (3, True, False),
    "zero3-offload": (3, False, True),
}


def every_file() -> Any:
    return pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_every_file_is_spoken_of_and_tried() -> None:
    assert {file.name for file in FILES} == {f"{name}.json" for name in ENGINES}
    text = (FOLDER.parent / "docs" / "usage.md").read_text()
    assert [file.name for file in FILES if f"(../configs/deepspeed/{file.name})" not in text] == []


@every_file()
def test_the_hugging_face_trainer_fills_a_file_in(file: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments = TrainingArguments(tmp_path, bf16=True, use_cpu=True, per_device_train_batch_size=2)
    read = HfTrainerDeepSpeedConfig(json.loads(file.read_text()))
    read.trainer_config_process(arguments)
    model = type("Model", (), {"config": type("Config", (), {"hidden_size": 64})()})()
    read.trainer_config_finalize(arguments, model, 100)
    unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(read.config) and read.config["bf16"]["enabled"]


def engine_of_a_run(folder: str, file: str) -> dict[str, Any]:
    run = f"{folder}/{Path(file).stem}"
    outcome = run_here(
        {
            "model": {"path": f"{folder}/model", "storage": "nf4", "dtype": "bfloat16"},
            "subspace": {"rank": 4},
            "data": {"train": f"{folder}/train.jsonl", "max_length": 96},
            "training": {"max_steps": 2, "global_batch_size": 4, "max_grad_norm": 0.25},
            "deepspeed": {"config": file},
            "run": {"output_dir": run, "report_to": "none"},
        }
    )
    engine = outcome.seen.engines[-1]
    zero = engine._config.zero_config
    return {
        "ranks": world().size,
        "stage": engine.zero_optimization_stage(),
        "bf16": bool(engine.bfloat16_enabled()),
        "offload": [str(getattr(target, "device", "none")) for target in (zero.offload_param, zero.offload_optimizer)],
        "clipping": engine.gradient_clipping(),
        "persistent": zero.param_persistence_threshold,
        "bucket": zero.reduce_bucket_size,
        "contiguous": zero.contiguous_gradients,
    }


@every_file()
def test_a_run_on_two_ranks_has_the_engine_that_a_file_asks_for(file: Path, stock: Path) -> None:
    stage, in_bf16, offloaded = ENGINES[file.stem]
    for found in run_on_ranks(2, engine_of_a_run, str(stock), str(file)):
        assert (found["ranks"], found["stage"], found["bf16"]) == (2, stage, in_bf16)
        assert found["offload"] == (["cpu", "cpu"] if offloaded else ["none", "none"])
        assert found["clipping"] == 0.25 and found["contiguous"] and found["bucket"] == 65536
        assert stage < 3 or found["persistent"] == 0, "no weight of a small model stays whole"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    make_model(folder / "model")
    make_records(folder / "train.jsonl", 40)
    return folder
