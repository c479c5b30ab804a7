"""The device of these tests."""

from __future__ import annotations

from typing import Any

import torch

DEVICE = torch.device("cuda", 0)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}
