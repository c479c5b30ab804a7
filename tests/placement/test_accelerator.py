"""DeepSpeed is told what it computes on."""

from __future__ import annotations

import os

import pytest
import torch

from dist_subspace.placement.accelerator import choose_accelerator


@pytest.mark.parametrize(("gpu", "before", "after"), [(False, None, "cpu"), (False, "xpu", "xpu"), (True, None, None)])
def test_a_computer_without_a_gpu_is_a_cpu_unless_somebody_has_said_more(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if before is not None:
        monkeypatch.setenv("DS_ACCELERATOR", before)
    choose_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == after
