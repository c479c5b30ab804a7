"""A run in a page of text: its state, its losses, its speed, and whether its checkpoints are whole. Local; reads only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_subspace.checkpoint.status import read_status
from dist_subspace.checkpoint.store import checkpoints, verify
from dist_subspace.errors import UsageError
from dist_subspace.report.curve import title
from dist_subspace.report.history import evaluation_lines, number, read_lines, training_lines
from dist_subspace.report.quantities import amount, bytes_text, clock_text


def run_report(run_dir: str | Path) -> str:
    """The text of `dist-subspace report`.

    Raises:
        UsageError: the folder is not there, or is no run's.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise UsageError(f"{str(run_dir)!r} is no folder; accepted: the run.output_dir of a run")
    lines, status, saved = read_lines(run), read_status(run), checkpoints(run)
    if not lines and status is None and not saved:
        raise UsageError(f"{str(run_dir)!r} is no run: it has no status.json, no metrics.jsonl and no checkpoint")
    parts = [
        [("run", str(run)), ("what", title(run)), ("state", _state(status))],
        _training(training_lines(lines)),
        _evaluation(evaluation_lines(lines)),
        _checkpoints(saved),
        [("adapter", str(run / "adapter"))] if (run / "adapter").is_dir() else [],
    ]
    return "\n".join(f"{name:<14}{text}".rstrip() for part in parts for name, text in part)


def _state(status: dict[str, Any] | None) -> str:
    if status is None:
        return "unknown (no status.json)"
    text = str(status.get("state"))
    text += f" at step {status['step']:,}" if isinstance(status.get("step"), int) else ""
    text += f" on rank {status['rank']}" if status.get("rank") is not None else ""
    text += f" ({status.get('time')})"
    said = status.get("message") or status.get("warning")
    return f"{text}: {said}" if said else text


def _training(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not lines:
        return [("training", "no step was logged")]
    last = lines[-1]
    rows = [("step", f"{last['step']:,}" + _epoch(last))]
    losses = [(number(line, "loss"), line["step"]) for line in lines]
    finite = [pair for pair in losses if math.isfinite(pair[0])]
    if finite:
        ends = f"first {_at(finite[0])}, last {_at(finite[-1])}, best {_at(min(finite))}"
        rows.append(("training loss", ends))
    if len(finite) < len(losses):
        rows.append(("not finite", f"the loss of {len(losses) - len(finite)} of {len(losses)} logged steps"))
    return rows + _speed(lines)


def _speed(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    speeds = sorted(value for line in lines if math.isfinite(value := number(line, "tokens_per_second")))
    if speeds:
        rows.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)"))
    peak = max((value for line in lines if math.isfinite(value := number(line, "peak_memory_bytes"))), default=0.0)
    if peak:
        rows.append(("peak memory", f"{bytes_text(peak)} (largest rank)"))
    tokens, seconds = number(lines[-1], "tokens"), number(lines[-1], "elapsed_seconds")
    if math.isfinite(tokens) and math.isfinite(seconds):
        rows.append(("in all", f"{tokens:,.0f} tokens in {clock_text(seconds)}"))
    return rows


def _evaluation(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not lines:
        return []
    last = lines[-1]
    found = ", ".join(f"{key[5:].replace('_', ' ')} {amount(v)}" for key, v in last.items() if key.startswith("eval_"))
    rows = [("evaluation", f"at step {last['step']:,}: {found}")]
    losses = [(number(line, "eval_loss"), line["step"]) for line in lines]
    finite = [pair for pair in losses if math.isfinite(pair[0])]
    if len(finite) > 1:
        rows.append(("", f"loss: first {_at(finite[0])}, best {_at(min(finite))}"))
    return rows


def _checkpoints(saved: dict[int, Path]) -> list[tuple[str, str]]:
    if not saved:
        return [("checkpoints", "none")]
    rows = []
    for path in saved.values():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        rows.append((path.name, f"{bytes_text(size):>12}  {verify(path) or 'whole'}"))
    width = max(len(name) for name, _ in rows)
    return [("checkpoints", str(len(rows))), *(("", f"{name:<{width}}{text}") for name, text in rows)]


def _epoch(line: dict[str, Any]) -> str:
    epoch = number(line, "epoch")
    return f" (epoch {epoch:.2f})" if math.isfinite(epoch) else ""


def _at(pair: tuple[float, int]) -> str:
    return f"{amount(pair[0])} (step {pair[1]:,})"
