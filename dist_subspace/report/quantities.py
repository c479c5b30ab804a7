"""Numbers as people read them: bytes, times, losses. Plain ASCII, because a log may be read in any encoding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dist_subspace.run_folder.records import StepRecord

SHOWN = ("rewards/accuracies", "rewards/margins", "kl")
"""The figures of preferences that a line has room for; metrics.jsonl has all."""


def bytes_text(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def clock_text(seconds: float) -> str:
    """Whole seconds as m:ss, h:mm:ss, or days before it."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def amount(value: Any) -> str:
    """A measured number in four or five figures; '-' for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if not math.isfinite(value):
        return str(value)
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.1f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.3e}"


def figures(record: StepRecord) -> list[str]:
    """The parts of a step's line; what is not known gives no part."""
    parts = [f"loss {amount(record.loss)}"]
    if record.penalty is not None:
        parts.append(f"penalty {amount(record.penalty)}")
    parts += [f"{name} {amount(record.figures[name])}" for name in SHOWN if name in record.figures]
    if record.learning_rate is not None:
        parts.append(f"lr {record.learning_rate:.2e}")
    if record.grad_norm is not None:
        parts.append(f"grad norm {record.grad_norm:.3g}")
    if record.tokens_per_second is not None:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    if record.peak_memory_bytes:
        parts.append(bytes_text(record.peak_memory_bytes))
    return parts


def joined(parts: Iterable[str], separator: str) -> str:
    return separator.join(part for part in parts if part)
