"""A run in a page of text: its state, its losses, its speed, and whether its checkpoints are whole. Local; reads only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.report.curve import title
from dist_subspace.report.quantities import amount, bytes_text, clock_text
from dist_subspace.run_folder.folder import RunFolder, StrPath
from dist_subspace.run_folder.manifest import verify
from dist_subspace.run_folder.metrics import evaluation_lines, read_lines, training_lines
from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.run_folder.status import read_status


def run_report(run_dir: StrPath) -> str:
    """The text of `dist-subspace report`.

    Raises:
        UsageError: the folder is not there, or is no run's.
    """
    run = RunFolder(run_dir)
    if not run.path.is_dir():
        raise UsageError(f"{str(run)!r} is no folder; accepted: the run.output_dir of a run")
    lines, status, saved = read_lines(run), read_status(run), run.checkpoints()
    if not lines and status is None and not saved:
        raise UsageError(
            f"{str(run)!r} is no run: it has no {run.status.name}, no {run.metrics.name} and no checkpoint"
        )
    state = f"unknown (no {run.status.name})" if status is None else _state(status)
    parts = [
        [("run", str(run)), ("what", title(run)), ("state", state)],
        _training(training_lines(lines)),
        _evaluation(evaluation_lines(lines)),
        _checkpoints(saved),
        [("adapter", str(run.adapter))] if run.adapter.is_dir() else [],
    ]
    return "\n".join(f"{name:<14}{text}".rstrip() for part in parts for name, text in part)


def _state(status: dict[str, Any]) -> str:
    text = str(status.get("state"))
    text += f" at step {status['step']:,}" if isinstance(status.get("step"), int) else ""
    text += f" on rank {status['rank']}" if status.get("rank") is not None else ""
    text += f" ({status.get('time')})"
    said = status.get("message") or status.get("warning")
    return f"{text}: {said}" if said else text


def _training(lines: Sequence[StepRecord]) -> list[tuple[str, str]]:
    if not lines:
        return [("training", "no step was logged")]
    last = lines[-1]
    epoch = "" if last.epoch is None else f" (epoch {last.epoch:.2f})"
    rows = [("step", f"{last.step:,}{epoch}")]
    losses = [(line.loss, line.step) for line in lines]
    finite = [pair for pair in losses if math.isfinite(pair[0])]
    if finite:
        ends = f"first {_at(finite[0])}, last {_at(finite[-1])}, best {_at(min(finite))}"
        rows.append(("training loss", ends))
    if len(finite) < len(losses):
        rows.append(("not finite", f"the loss of {len(losses) - len(finite)} of {len(losses)} logged steps"))
    return rows + _speed(lines)


def _speed(lines: Sequence[StepRecord]) -> list[tuple[str, str]]:
    rows = []
    speeds = sorted(line.tokens_per_second for line in lines if line.tokens_per_second is not None)
    if speeds:
        rows.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)"))
    peak = max((line.peak_memory_bytes or 0 for line in lines), default=0)
    if peak:
        rows.append(("peak memory", f"{bytes_text(peak)} (largest rank)"))
    tokens, seconds = lines[-1].tokens, lines[-1].elapsed_seconds
    if tokens is not None and seconds is not None:
        rows.append(("in all", f"{tokens:,.0f} tokens in {clock_text(seconds)}"))
    return rows


def _evaluation(lines: Sequence[Evaluation]) -> list[tuple[str, str]]:
    if not lines:
        return []
    last = lines[-1]
    figures = ", ".join(f"{name} {amount(value)}" for name, value in last.figures.items())
    rows = [("evaluation", f"at step {last.step:,}: {figures}")]
    losses = [(line.loss, line.step) for line in lines]
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


def _at(pair: tuple[float, int]) -> str:
    return f"{amount(pair[0])} (step {pair[1]:,})"
