"""Fixtures and rules for all tests: real data, seeds, what needs a GPU, and the end of the test ranks."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIST_SUBSPACE_CACHE", tempfile.mkdtemp(prefix="dist_subspace-tests-"))  # ended with the session

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dist_subspace.notices import heard
from dist_subspace.placement import process_group
from dist_subspace.stopping import STOP
from tests.ranks import ROOT, close_pools

process_group.ENDS_WITH_COMMAND = False  # the process of the tests calls one after another

LONGEST = ("matrix/test_matrix.py", "training/test_run.py", "launch/test_train.py", "training/test_schedules.py")
# Seconds, a start of ranks and a case of theirs among them; where the pytest-timeout plugin is there and the test names no
# limit of its own.
TEST_TIMEOUT = 900


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; there is none")
    # With several workers a file that begins last ends alone.
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    limits = config.pluginmanager.hasplugin("timeout")
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if limits and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))


def pytest_collection_finish() -> None:
    # DeepSpeed collects garbage for every engine; what is imported, and the tests themselves, need no look each time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    close_pools()
    if os.environ["DIST_SUBSPACE_CACHE"].startswith(tempfile.gettempdir()):
        shutil.rmtree(os.environ["DIST_SUBSPACE_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def deterministic_seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def not_told_to_stop() -> None:
    """What a run of an earlier test was told stays until the next run of this process begins."""
    STOP.reset()


@pytest.fixture(autouse=True)
def environment_kept() -> Iterator[None]:
    """A test leaves the environment as it was: accelerate writes LOCAL_WORLD_SIZE there, which the processes of a later test
    would take for their launcher's. This process's place in its group of one stays as long as the group: DeepSpeed asks for it.
    """
    before = dict(os.environ)
    yield
    of_group = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} if torch.distributed.is_initialized() else set()
    for name in os.environ.keys() - before.keys() - of_group:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name not in of_group})


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data: DIST_SUBSPACE_DATA, or shared/data beside the repository."""
    named = os.environ.get("DIST_SUBSPACE_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set DIST_SUBSPACE_DATA)")
    return folder


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """A pretrained LLaMA of 260,032 parameters as a transformers folder."""
    folder = data_dir / "models" / "stories260K" / "hf"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model in {folder} (set DIST_SUBSPACE_DATA)")
    return folder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The sentences that the package says to its user during the test (dist_subspace/notices.py)."""
    sentences: list[str] = []
    with heard(sentences.append):
        yield sentences


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
