"""What a person sees of a run: on a terminal a live line, elsewhere plain lines without control characters.

Rank 0 passes `enabled=True`, every other rank False: then nothing is printed. Nothing here decides anything.
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from dist_subspace.report.quantities import amount, bytes_text, clock_text, figures, joined
from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.training.announce import announced

PLAIN_WIDTH = 120  # columns of a log file
_EVERY = 30.0  # seconds between two lines of a long preparation in a log file


class Display:
    """The screen of one run of `total_steps` optimizer steps; a context manager that leaves the terminal sane."""

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self._console = console or _console()
        self._live_output = self._console.is_interactive and self._console.file.isatty()
        self._clock = clock
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("[progress.percentage]{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, left="")
        self._step = 0
        self._started: tuple[int, float] | None = None
        self._record: StepRecord | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show_config(self, config_text: str) -> None:
        """The resolved configuration, as YAML text."""
        if not self.enabled:
            return
        if self._live_output:
            body = Syntax(config_text.rstrip(), "yaml", background_color="default", word_wrap=True)
            self._console.print(Panel(body, title="configuration", title_align="left", border_style="dim"))
        else:
            self._say("configuration:\n" + "\n".join(f"  {line}" for line in config_text.rstrip().splitlines()))

    def show_summary(
        self, rows: Sequence[tuple[str, int, int, int]], totals: tuple[int, int, int] | None = None, title: str = ""
    ) -> None:
        """A table of (name, trainable parameters, frozen parameters, bytes per rank); totals are sums unless given."""
        if not self.enabled:
            return
        whole = totals or (sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows))
        share = 100 * whole[0] / max(1, whole[0] + whole[1])
        table = Table(show_footer=True, header_style="bold")
        table.add_column("module", f"all ({share:.3g} % trained)", overflow="fold")
        for name, total in zip(("trainable", "frozen"), whole, strict=False):
            table.add_column(name, f"{total:,}", justify="right", no_wrap=True)
        table.add_column("bytes per rank", bytes_text(whole[2]), justify="right", no_wrap=True)
        for name, trainable, frozen, size in rows:
            table.add_row(Text(name), f"{trainable:,}", f"{frozen:,}", bytes_text(size))
        if title:
            self._say(title, "bold")
        self._console.print(table)

    @contextmanager
    def loading(self, what: str, text: Callable[[int], str] = "{:,}".format) -> Iterator[Callable[[int, int], None]]:
        """A bar for a long preparation; the block calls what it is given with (done, total), which `text` makes words of.
        Elsewhere lines, now and then."""
        began = self._clock()

        def state(done: int, total: int) -> str:
            left = (self._clock() - began) * (total / done - 1) if done else math.inf
            return f"{text(done)} of {text(total)}, {clock_text(left)} left"

        if not self.enabled or not self._live_output:
            with announced(what, self._say, over=False):
                yield self._counting(what, state)
        else:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"))
            with Progress(*columns, console=self._console, transient=True, expand=True) as progress:
                task = progress.add_task(what, total=None, state="")
                yield lambda done, total: progress.update(task, completed=done, total=total, state=state(done, total))
        self._say(f"{what}: done in {self._clock() - began:.1f} s")

    def _counting(self, what: str, state: Callable[[int, int], str]) -> Callable[[int, int], None]:
        """A line every half a minute."""
        said = self._clock()

        def count(done: int, total: int) -> None:
            nonlocal said
            if done < total and self._clock() - said > _EVERY:
                said = self._clock()
                self._say(f"{what}: {state(done, total)}")

        return count

    def start(self, step: int = 0) -> None:
        """Training begins after `step` finished steps (above 0 when a run continues)."""
        self._step, self._started = step, (step, self._clock())
        if not self.enabled:
            return
        if step:
            left = "" if step < self.total_steps else ": no step is left to make"
            self.notice(f"continuing after step {step:,}, to step {self.total_steps:,}{left}")
        if self._live_output:
            self._progress.update(self._task, completed=step)
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render)
            atexit.register(self.close)  # a caller that forgets to close must not leave the cursor hidden
            self._live.start()

    def advance(self, step: int) -> None:
        """A step has finished; call it after every one, so that the bar moves between logged steps."""
        if not self.enabled or step <= self._step:
            return
        self._step = step
        self._progress.update(self._task, completed=step, left=f"{self._left()} left")

    def update(self, record: StepRecord) -> None:
        """A logged step. The live line shows it; elsewhere it is printed as one line."""
        self.advance(record.step)
        self._record = record
        if self.enabled and self._live is None:
            step = f"step {record.step}/{self.total_steps}"
            self._say(joined([step, *figures(record), f"{self._left()} left"], " | "))

    def notice(self, text: str, warning: bool = False) -> None:
        """Something worth knowing, or with `warning` something worth minding; stays on the screen."""
        self._say(f"warning: {text}" if warning else text, "yellow" if warning else "cyan")

    def warning(self, text: str) -> None:
        self.notice(text, warning=True)

    def evaluation(self, evaluation: Evaluation) -> None:
        """The result of an evaluation; stays on the screen."""
        figures = [f"{name} {amount(value)}" for name, value in evaluation.figures.items()]
        self._say(joined([f"evaluation at step {evaluation.step}", *figures], " | "), "green")

    def finish(self, message: str, adapter: Path | str | None = None, curve: Path | str | None = None) -> None:
        """The end: what became of the run, where the adapter and the picture lie."""
        self.close()
        self._say(message, "bold")
        for name, path in (("adapter", adapter), ("loss curve", curve)):
            if path is not None:
                self._say(f"{name + ':':<12}{path}")

    def close(self) -> None:
        """End the live line; the cursor is visible again. Harmless when called twice."""
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self.close)
            live.stop()

    def _say(self, text: str, style: str = "") -> None:
        if self.enabled:
            self._console.print(Text(text, style=style), soft_wrap=True)

    def _left(self) -> str:
        """From the mean since the start, which evaluations and checkpoints are part of."""
        if self._started is None or self._step <= self._started[0]:
            return "-:--"
        step, begun = self._started
        return clock_text((self._clock() - begun) / (self._step - step) * max(0, self.total_steps - self._step))

    def _render(self) -> Group:
        parts = [] if self._record is None else figures(self._record)
        line = Text(joined(parts, "  "), no_wrap=True, overflow="ellipsis")
        if self._record is not None and not math.isfinite(self._record.loss):
            line.stylize("bold red")
        return Group(self._progress, line)


def _console() -> Console:
    """Standard output; a log file is wider than the 80 columns that rich assumes for it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
