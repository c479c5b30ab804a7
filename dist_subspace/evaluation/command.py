"""`dist-subspace eval`: all ranks measure together, and rank 0 says and writes what was found."""

from __future__ import annotations

import json
import sys
from functools import partial

from rich.console import Console

from dist_subspace.atomic_files import json_ready, write_json_atomic
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.measuring import measure
from dist_subspace.evaluation.reading import read_subject
from dist_subspace.evaluation.results import Evaluated, print_figures, write_card, write_result
from dist_subspace.evaluation.subject import Subject
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import on_main, world
from dist_subspace.placement.process_group import allow_collectives
from dist_subspace.run_folder.status import EXIT_INTERRUPTED, EXIT_OK
from dist_subspace.stopping import Interrupted
from dist_subspace.training.display import Display
from dist_subspace.training.last_words import Run, end
from dist_subspace.training.run import ended, watched


def evaluate(asked: Asked) -> int:
    """Collective: the command; its exit status (0 measured, 2 refused, 75 interrupted, 1 failed)."""
    run = Run()
    return watched(run, partial(_evaluated, run, asked), say=_say)


def _evaluated(run: Run, asked: Asked) -> int:
    console = Console(stderr=True, highlight=False)
    run.display = display = Display(enabled=world().is_main, total_steps=0, console=console)
    try:
        with display, heard(display.notice):
            subject = on_main(read_subject, asked)
            _watch(run, subject)
            if asked.tasks:
                from dist_subspace.evaluation.harness import measure_tasks

                found = measure_tasks(asked, subject, display)
            else:
                found = measure(asked, subject, display)
            on_main(_conclude, asked, subject, found)
        return EXIT_OK
    except Interrupted as told:
        kept = "nothing was kept" if asked.tasks else "nothing was kept (--predictions keeps results)"
        again = "run the same command to go on" if asked.predictions else kept
        return end(run, "interrupted", f"interrupted by {told}; {again}", EXIT_INTERRUPTED)
    except Exception as error:
        return ended(run, error)


def _watch(run: Run, subject: Subject) -> None:
    """From now on the configuration says how long a rank may be silent."""
    if run.heartbeat is not None:
        run.heartbeat.allow(subject.config.training.rank_timeout)
        allow_collectives(subject.config.training.rank_timeout)


def _conclude(asked: Asked, subject: Subject, found: Evaluated) -> None:
    """Local, rank 0: what was measured is said first, and written then."""
    if asked.as_json:
        print(json.dumps(json_ready(found.as_dict()), indent=2, ensure_ascii=False), flush=True)
    else:
        print_figures(found)
    if asked.output is not None:
        write_json_atomic(asked.output, found.as_dict())
        _say(f"written: {asked.output}")
    if subject.run is not None and subject.adapter is not None and subject.run.path.is_dir():
        name = found.about["data"] if not asked.tasks else "-".join(asked.tasks)
        _say(f"written: {write_result(subject.run, found.as_dict(), subject.adapter, name)}")
        is_final = subject.adapter.resolve() == subject.run.adapter.resolve()
        if is_final and asked.limit is None and (card := write_card(subject.run, found)) is not None:
            _say(f"the figures stand in {card}, which a push takes along")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
