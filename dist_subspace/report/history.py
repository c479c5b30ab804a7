"""What RUN/metrics.jsonl says: training lines and evaluation lines. Local; reads only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every whole line in file order. A line that is no JSON object with a step (the last, cut by a kill) is left out."""
    try:
        text = (Path(run_dir) / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for raw in text.splitlines() if (line := _parsed(raw)) is not None]


def training_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


def evaluation_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if any(key.startswith("eval_") for key in line)]


def number(line: dict[str, Any], key: str) -> float:
    """The value as a float; NaN where it is absent or null (a loss that was no number is written as null)."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _parsed(raw: str) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
