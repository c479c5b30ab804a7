"""All of this folder needs a CUDA device: one process, one rank (NCCL), small models."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks_worker import CleanState
from tests.tiny_models import save_odd
from tests.tiny_run import make_model, make_records

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def process_group() -> CleanState:
    """One rank. cuBLAS is repeatable in the whole process: it reads the setting once, when it is first used."""
    from dist_subspace.placement.deepspeed.process_group import ensure_process_group
    from dist_subspace.placement.deepspeed.quiet import be_quiet

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    be_quiet()
    ensure_process_group()
    return CleanState()


@pytest.fixture(autouse=True)
def clean(process_group: CleanState) -> Iterator[None]:
    """DeepSpeed's, accelerate's and torch's process-wide state as it was, and the device's memory free."""
    yield
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    torch.cuda.set_sync_debug_mode("default")
    AcceleratorState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    process_group.restore()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` and `gpt2` of odd widths, in float32."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2"):
        save_odd(folder, family)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and records: what a whole run needs."""
    path = tmp_path_factory.mktemp("runs")
    make_model(path / "model")
    make_model(path / "wide", width=128)
    make_records(path / "train.jsonl", 60)
    make_records(path / "eval.jsonl", 12)
    return path
