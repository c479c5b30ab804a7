"""What a person sees of a run: on a terminal a live line, elsewhere plain lines without control characters.

Rank 0 passes `enabled=True`, every other rank False: then nothing is printed. Nothing here decides anything.
"""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from dist_subspace.report.quantities import amount, bytes_text, clock_text, figures, joined
from dist_subspace.run_folder.records import Evaluation, StepRecord
from dist_subspace.training.announce import announced
from dist_subspace.training.pace import Pace
from dist_subspace.training.pulse import MINUTE, Pulse

PLAIN_WIDTH = 120  # columns of a log file
_EVERY = 30.0  # seconds between two lines of a long preparation in a log file
_NO_TIMES: Mapping[str, int | None] = {}


class Display:
    """The screen of one run of `total_steps` optimizer steps; a context manager that leaves the terminal sane.

    Arguments:
        every: steps between two evaluations and two checkpoints, by these names (training/pace.py).
        silence: seconds after which a log file gets a line in any case while the run trains.
    """

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: Mapping[str, int | None] = _NO_TIMES,
        silence: float = MINUTE,
    ) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self.pace = Pace(total_steps, every, clock)
        self.console = self._console = console or _console()
        self.is_live = self._console.is_interactive and self._console.file.isatty()
        self._clock, self._silence = clock, silence
        self._live: Live | None = None
        self._pulse: Pulse | None = None
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
        self._loss: float | None = None  # of the last step, logged or not
        self._activity: tuple[str, int, int] | None = None  # what goes on, rounds done, rounds in all
        self._record: StepRecord | None = None
        self._evaluated: Evaluation | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show_config(self, lines: Sequence[str], whole: Path | str) -> None:
        """The configuration as lines of text; `whole` is where all of it will be."""
        if self.enabled:
            self._say(
                "\n".join((f"configuration beside the defaults (every key: {whole}):", *(f"  {x}" for x in lines)))
            )

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

        if not self.enabled or not self.is_live:
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
        self._step = step
        self.pace.start(step)
        if not self.enabled:
            return
        if step:
            left = "" if step < self.total_steps else ": no step is left to make"
            self.notice(f"continuing after step {step:,}, to step {self.total_steps:,}{left}")
        if self.is_live:
            self._progress.update(self._task, completed=step)
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render)
            atexit.register(self.close)  # a caller that forgets to close must not leave the cursor hidden
            self._live.start()
        else:
            self._pulse = Pulse(self._say_where, self._silence, self._silence)

    @contextmanager
    def during(self, what: str, rounds: int) -> Iterator[None]:
        """Within the block `what` goes on, in so many rounds, which `moved` counts: what is shown between two lines."""
        before, self._activity = self._activity, (what, 0, rounds)
        try:
            yield
        finally:
            self._activity = before

    def moved(self) -> None:
        """One more round of what goes on is done."""
        if self._activity is not None:
            what, done, rounds = self._activity
            self._activity = (what, done + 1, max(rounds, done + 1))

    def advance(self, step: int, loss: float | None = None) -> None:
        """A step has finished; call it after every one, so that the bar moves between logged steps."""
        if step <= self._step:
            return
        self._step, self._loss = step, loss
        self.pace.step(step)
        if self.enabled:
            self._progress.update(self._task, completed=step, left=self.pace.text())

    def update(self, record: StepRecord) -> None:
        """A logged step. The live line shows it; elsewhere it is printed as one line."""
        self.advance(record.step, record.loss)
        self._record = record
        if self.enabled and self._live is None:
            self._say(joined([*self._where(record), *figures(record), self.pace.text()], " | "))

    def notice(self, text: str, warning: bool = False) -> None:
        """Something worth knowing, or with `warning` something worth minding; stays on the screen."""
        self._say(f"warning: {text}" if warning else text, "yellow" if warning else "cyan")

    def warning(self, text: str) -> None:
        self.notice(text, warning=True)

    def evaluation(self, evaluation: Evaluation, remark: str = "") -> None:
        """The result of an evaluation; stays on the screen."""
        self._evaluated = evaluation
        figures = [f"{name} {amount(value)}" for name, value in evaluation.figures.items()]
        self._say(joined([f"evaluation at step {evaluation.step}{remark}", *figures], " | "), "green")

    def finish(
        self, message: str, adapter: Path | str | None = None, curve: Path | str | None = None, chosen: str = ""
    ) -> None:
        """The end: what became of the run, where the adapter (`chosen` says of which step) and the picture lie."""
        self.close()
        self._say(message, "bold")
        for name, path in (("adapter", adapter), ("loss curve", curve)):
            if path is not None:
                self._say(f"{name + ':':<12}{path}{f' ({chosen})' if chosen and name == 'adapter' else ''}")

    def close(self) -> None:
        """End the live line; the cursor is visible again. Harmless when called twice."""
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            pulse.close()
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self.close)
            live.stop()

    def _say(self, text: str, style: str = "") -> None:
        if self.enabled:
            self._console.print(Text(text, style=style), soft_wrap=True)
            if self._pulse is not None:
                self._pulse.touch()

    def _say_where(self) -> None:
        """Where a run is that has said nothing for a while."""
        step, loss = f"step {self._step}/{self.total_steps}", "" if self._loss is None else f"loss {amount(self._loss)}"
        self._say(joined([step, loss, self._activity_text(), self.pace.text()], " | "))

    def _activity_text(self) -> str:
        if self._activity is None:
            return ""
        what, done, rounds = self._activity
        return f"{what}: {done} of {rounds}"

    def _where(self, record: StepRecord) -> list[str]:
        epoch = [] if record.epoch is None else [f"epoch {record.epoch:.2f}"]
        return [f"step {record.step}/{self.total_steps}", *epoch]

    def _render(self) -> Group:
        parts = [] if self._record is None else [*self._where(self._record)[1:], *figures(self._record)]
        if self._evaluated is not None and math.isfinite(self._evaluated.loss):
            parts.append(f"validation {amount(self._evaluated.loss)} (step {self._evaluated.step})")
        if self._activity is not None and self._activity[2] > 1:
            parts.append(self._activity_text())
        line = Text(joined(parts, "  "))  # which wraps: nothing is cut off on a narrow terminal
        if self._record is not None and not math.isfinite(self._record.loss):
            line.stylize("bold red")
        return Group(self._progress, line)


def _console() -> Console:
    """Standard output; a log file is wider than the 80 columns that rich assumes for it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
