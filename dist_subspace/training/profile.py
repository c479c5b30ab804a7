"""`run.profile`: a torch trace of some steps, and a table of where their time went. Local, rank 0.

RUN/profile/trace.json opens in ui.perfetto.dev; RUN/profile/table.txt has the table, and torch's of operators. Parts of a
step are told apart by `part`, which costs nothing where nobody measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dist_subspace.atomic_files import make_folder, write_text_atomic

BEFORE = 2  # steps of this start that are not measured: they make kernels and buffers
_ROWS = 40  # of torch's table
_PARTS = ("data", "forward", "backward", "optimizer")
_measures = False


@contextmanager
def part(name: str) -> Iterator[None]:
    """Within the block the time belongs to this part of a step: data, forward, backward or optimizer."""
    if not _measures:
        yield
        return
    with torch.profiler.record_function(f"step/{name}"):
        yield


class Profile:
    """The trace of `steps` steps, from the third of this start on.

    Arguments:
        folder: RUN/profile.
        say: where the table of parts, and what went wrong, is told. A profile is a convenience: its failure never ends a run.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._say = steps, folder, say
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._made = 0
        self._profiler: torch.profiler.profile | None = None

    def step(self) -> None:
        """A step has been made."""
        self._made += 1
        if self._made == BEFORE:
            self._begin()
        elif self._made == BEFORE + self._steps:
            self.close()

    def close(self) -> None:
        """Write what was measured, unless it is written, or nothing was."""
        global _measures
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        _measures = False
        try:
            profiler.stop()
            self._write(profiler, self._made - BEFORE)
        except Exception as error:
            self._say(f"run.profile: nothing could be written ({type(error).__name__}: {error})")

    def _begin(self) -> None:
        global _measures
        try:
            profiler = torch.profiler.profile(activities=self._activities, acc_events=True)
            profiler.start()
        except Exception as error:
            self._say(f"run.profile: torch's profiler does not start ({type(error).__name__}: {error})")
            return
        self._profiler, _measures = profiler, True

    def _write(self, profiler: torch.profiler.profile, steps: int) -> None:
        if not steps:
            return
        averages = profiler.key_averages()
        make_folder(self._folder)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        order = "self_device_time_total" if len(self._activities) > 1 else "self_cpu_time_total"
        whole = averages.table(sort_by=order, row_limit=_ROWS)
        seconds = dict.fromkeys(_PARTS, 0.0)
        for event in averages:
            name = event.key.removeprefix("step/")
            if event.key.startswith("step/") and name in seconds and event.cpu_time_total:
                seconds[name] += event.cpu_time_total / 1e6 / steps
        table = parts_text(seconds)
        write_text_atomic(self._folder / "table.txt", f"{table}\n\n{whole}\n")
        self._say(f"profile of {steps} steps in {self._folder}:\n{table}")


def parts_text(seconds: dict[str, float]) -> str:
    """A line for each part of a step, with its seconds a step and its share."""
    total = sum(seconds.values()) or 1.0
    return "\n".join(
        f"  {name:<10}{each:>10.4f} s a step {100 * each / total:>5.1f}%" for name, each in seconds.items()
    )
