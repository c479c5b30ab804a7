"""The type of the computation where nobody gave one: what is fast here, and what a run has begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.config import load_config
from dist_subspace.loading import computation_type
from dist_subspace.run_folder import RunFolder
from dist_subspace.training.computation import dtype_begun_with, settled_dtype

CPU = torch.device("cpu")


@pytest.fixture(params=["fast", "slow"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As torch says of a processor with 16-bit products, and of one without."""
    monkeypatch.setattr(computation_type, "cpu_multiplies", lambda dtype: request.param == "fast")
    return str(request.param)


def settled(begun_with: str | None = None, device: torch.device = CPU, **model: Any) -> tuple[str | None, torch.dtype]:
    config = load_config({"model": {"path": "m", **model}, "data": {"train": "t.jsonl"}})
    config, dtype = settled_dtype(config, begun_with, device)
    return config.model.dtype, dtype


def test_a_packed_storage_computes_in_float32_where_16_bits_are_slow_and_that_is_recorded(machine: str) -> None:
    expected = ("float32", torch.float32) if machine == "slow" else (None, torch.bfloat16)
    for storage in ("nf4", "int8"):
        assert settled(storage=storage) == expected


def test_what_was_given_what_a_float_storage_is_and_what_a_gpu_computes_stays(machine: str) -> None:
    assert settled(storage="nf4", dtype="bfloat16") == ("bfloat16", torch.bfloat16)
    assert settled(storage="bf16") == (None, torch.bfloat16)
    assert settled(storage="nf4", device=torch.device("cuda")) == (None, torch.bfloat16)


def test_a_run_that_goes_on_keeps_its_type_wherever_it_goes_on(machine: str) -> None:
    assert settled("float32", storage="nf4")[1] == torch.float32
    assert settled("bfloat16", storage="nf4")[1] == torch.bfloat16


def test_what_a_run_has_begun_with_stands_in_its_configuration(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    assert dtype_begun_with(run, "auto") is None
    for line, dtype in (("dtype: float32", "float32"), ("dtype: null", "bfloat16"), ("path: m", "bfloat16")):
        run.config.write_text(f"model:\n  {line}\n")
        assert dtype_begun_with(run, "auto") is None, "no checkpoint: the run begins"
        run.checkpoint(3).mkdir(exist_ok=True)
        assert dtype_begun_with(run, "auto") == dtype
        assert dtype_begun_with(run, "none") is None
        assert dtype_begun_with(RunFolder(tmp_path / "new"), str(run.checkpoint(3))) == dtype
        run.checkpoint(3).rmdir()
