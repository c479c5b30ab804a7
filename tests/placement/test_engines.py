"""Which engine `deepspeed.preset` chooses, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.placement import engines
from dist_subspace.placement.whole.engine import WholeEngine


def test_a_stock_json_together_with_none_is_refused(tmp_path: Path) -> None:
    values = {
        "model": {"path": str(tmp_path)},
        "data": {"train": "t.jsonl"},
        "training": {"max_steps": 1},
        "deepspeed": {"preset": "none", "config": {"zero_optimization": {"stage": 2}}},
    }
    with pytest.raises(
        UsageError, match=r"^deepspeed\.preset is 'none', but deepspeed\.config is given.*accepted: one of"
    ):
        load_config(values, ())


def test_a_stock_json_is_known_again_wherever_it_and_its_disk_lie(tmp_path: Path) -> None:
    def stock(stage: int, disk: str) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage, "offload_param": {"device": "nvme", "nvme_path": disk}}}

    (tmp_path / "there.json").write_text(json.dumps(stock(3, "/fast")))
    same = engines.stock_digest(stock(3, "/scratch"))
    assert same == engines.stock_digest(tmp_path / "there.json") != engines.stock_digest(stock(2, "/fast"))
    assert engines.stock_digest({}) != engines.stock_digest(None) is None


@pytest.mark.parametrize(
    ("preset", "given", "words"),
    [
        ("zero0", None, "deepspeed.preset is 'zero0'"),
        ("zero3", {"zero_optimization": {"stage": 2}}, "deepspeed.config is given"),
    ],
)
def test_without_deepspeed_only_none_is_accepted(
    preset: str, given: dict[str, object] | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # its import raises
    engines.deepspeed_is_missing.cache_clear()
    try:
        engines.check_engine("none", None)
        with pytest.raises(UsageError, match=words + ", but DeepSpeed cannot be imported here .*preset none"):
            engines.check_engine(preset, given)
    finally:
        engines.deepspeed_is_missing.cache_clear()


def test_a_launcher_that_started_several_processes_is_seen_before_they_have_met(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "1", "SIZE": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "3"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):  # of a group that an earlier test has made
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="there are 3 ranks; accepted with several: zero0, zero1"):
        engines.check_engine("none", None)


def test_a_parameter_that_no_micro_batch_used_moves_as_with_a_gradient_of_zero() -> None:
    """By its momentum and its decay: so it is wherever ranks share gradients."""

    def moved(fill: bool) -> torch.Tensor:
        model = torch.nn.ParameterDict(
            {"used": torch.nn.Parameter(torch.ones(3)), "idle": torch.nn.Parameter(torch.ones(3))}
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        engine = WholeEngine(model, optimizer, 0.0)
        (model["used"].sum() + 2 * model["idle"].sum()).backward()
        engine.step(True)
        model["used"].sum().backward()
        if fill:
            model["idle"].grad = torch.zeros(3)
            optimizer.step()
        else:
            assert engine.step(True)
        return model["idle"].detach()

    assert torch.equal(moved(False), moved(True)) and float(moved(False)[0]) < 0.9
