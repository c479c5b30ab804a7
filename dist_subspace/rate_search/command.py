"""`dist-subspace find-lr`: all ranks try the rates together, and rank 0 says and writes what was found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from dist_subspace.atomic_files import json_ready
from dist_subspace.config import Config, load_config, settings_of_all
from dist_subspace.placement.collectives import agreed, on_main, refuse_unlike, world
from dist_subspace.placement.process_group import allow_collectives
from dist_subspace.rate_search.asked import Asked
from dist_subspace.rate_search.bench import Bench
from dist_subspace.rate_search.grid import grid, kept, rate_text, rungs
from dist_subspace.rate_search.results import FoundRate, print_found, write_found
from dist_subspace.rate_search.room import search_config, search_plan
from dist_subspace.rate_search.search import Search
from dist_subspace.report.quantities import amount, bytes_text, clock_text
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.status import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from dist_subspace.stopping import STOP, Interrupted
from dist_subspace.subspace import SuggestedRate
from dist_subspace.training.data.cutting_text import cutting_text
from dist_subspace.training.display import Display
from dist_subspace.training.engine_config import with_stock_choices
from dist_subspace.training.last_words import Run, end
from dist_subspace.training.observer import Observer
from dist_subspace.training.plan import Plan, make_plan
from dist_subspace.training.run import ended, watched


class Told:
    """What a search leaves to its caller. search: as far as it came; found: its result; message: why there is none."""

    search: Search | None = None
    found: FoundRate | None = None
    message: str = ""


def find_lr(asked: Asked, told: Told | None = None) -> int:
    """Collective: the command; its exit status (0 found, 2 refused, 75 interrupted, 1 failed or nothing found)."""
    run, told = Run(), told or Told()
    return watched(run, partial(_found, run, asked, told), say=_say)


def _found(run: Run, asked: Asked, told: Told) -> int:
    console = Console(stderr=True, highlight=False)
    run.display = display = Display(enabled=world().is_main, total_steps=0, console=console)
    try:
        with display:
            found = told.found = _searched(run, asked, told, display)
            on_main(_conclude, asked, found)
        if found.rate is None:
            told.message = found.verdict
            return end(run, "failed", found.verdict, EXIT_FAILED)
        return EXIT_OK
    except Interrupted as stop:
        told.message = f"interrupted by {stop}; {_best_so_far(told.search)}"
        return end(run, "interrupted", told.message, EXIT_INTERRUPTED)
    except Exception as error:
        told.message = f"{error}"
        return ended(run, error)


def _searched(run: Run, asked: Asked, told: Told, display: Display) -> FoundRate:
    began = time.monotonic()
    with STOP.leavable():
        with agreed("reading the configuration"):
            asked.check()
            given = load_config(asked.config, asked.overrides)
            folder = asked.folder(given)
            config = search_config(with_stock_choices(given), folder)
        options = {"--rates": asked.given_rates(), "--steps": asked.steps, "--eval-samples": asked.eval_samples}
        refuse_unlike(settings_of_all(config) | options)
        _watch(run, config)
        plan = run.plan = search_plan(make_plan(config, display.notice), asked.steps, asked.eval_samples)
        with agreed("planning the search"):
            rungs(len(asked.given_rates() or grid(1.0)), plan.total_steps)
        for sentence in (*cutting_text(plan.data.cutting, plan.config.data.max_length)[0], *plan.data.notices):
            display.notice(sentence)
        bench = Bench(plan, Observer(display, None, None, plan.device))
    search = told.search = _search(asked, plan, bench, display.notice)
    search.run()
    return _result(plan, bench, search, folder, time.monotonic() - began)


def _search(asked: Asked, plan: Plan, bench: Bench, say: Callable[[str], None]) -> Search:
    """The search that is about to begin; what it comes to is said."""
    given, own = asked.given_rates(), _own_rate(plan)
    centre = plan.config.training.rate if own is None else own.rate
    rates = given or grid(centre)
    steps = rungs(len(rates), plan.total_steps)
    where = f"around {rate_text(centre)}, {'as configured' if own is None else own.why}"
    warmup = int(plan.config.training.warmup_steps)
    say(f"{len(rates)} rates from {rate_text(rates[0])} to {rate_text(rates[-1])}, {'as given' if given else where}")
    say(
        f"schedule: {warmup} step{'' if warmup == 1 else 's'} of warm-up, then constant; held-out loss before training "
        f"{amount(bench.start_loss)}"
    )
    say(budget_text(len(rates), steps, bench.seconds, bench.evaluation_seconds, len(plan.data.eval or ())))
    say(f"each rate's state takes about {bytes_text(bench.first.bytes * 3)} of rank 0's memory while it may go on")
    return Search(bench, rates, steps, given is None, say)


def _own_rate(plan: Plan) -> SuggestedRate | None:
    """The method's, for the width of the model; None where that is not known."""
    return None if plan.rate is None else plan.rate.own


def budget_text(count: int, steps: list[int], step_seconds: float, evaluation_seconds: float, samples: int) -> str:
    """How many steps and evaluations of how long, without those of an extended grid."""
    made, evaluations, parts, before = 0, 0, [], 0
    for number, step in enumerate(steps):
        count = count if number == 0 else min(count, kept(count))
        made, evaluations = made + count * (step - before), evaluations + count
        parts.append(f"{count} to step {step}")
        before = step
    seconds = made * step_seconds + evaluations * evaluation_seconds
    return (
        f"{', '.join(parts)}: at most {made:,} steps ({step_seconds:.2g} s each) and {evaluations} evaluations of "
        f"{samples:,} samples ({evaluation_seconds:.2g} s each), about {clock_text(seconds)}"
    )


def _result(plan: Plan, bench: Bench, search: Search, folder: RunFolder, seconds: float) -> FoundRate:
    best, config = search.best, plan.config
    lowers = best is not None and best.loss_at(max(best.evaluations)) < bench.start_loss
    rank = f" (rank {plan.resolved.settings.rank})" if plan.resolved.info.uses_rank else ""
    about = {
        "model": Path(config.model.path).name,
        "method": f"{plan.resolved.info.name}{rank}",
        "storage": config.model.storage,
        "data": Path(config.data.eval).name
        if isinstance(config.data.eval, str)
        else f"{config.data.eval:g} of the training data",
        "eval_samples": len(plan.data.eval or ()),
        "warmup_steps": int(config.training.warmup_steps),
        "global_batch_size": config.training.global_batch_size,
        "seed": config.training.seed,
    }
    own = _own_rate(plan)
    for tried in search.tried:
        tried.held = None  # nobody goes on from there, and a result may be kept for long
    return FoundRate(
        rate=best.rate if best is not None and lowers else None,
        own_rate=None if own is None else own.rate,
        start_loss=bench.start_loss,
        rungs=search.rungs,
        tried=sorted(search.tried, key=lambda tried: tried.rate),
        edge=search.edge if lowers else None,
        seconds=seconds,
        folder=folder.path,
        about=about,
    )


def _best_so_far(search: Search | None) -> str:
    best = None if search is None else search.best
    if best is None:
        return "no rate was measured yet; the same command begins anew"
    step = max(best.evaluations)
    return (
        f"the best so far is training.learning_rate={rate_text(best.rate)}, held-out loss {amount(best.loss_at(step))} after "
        f"{step} steps; the same command begins anew"
    )


def _watch(run: Run, config: Config) -> None:
    """From now on the configuration says how long a rank may be silent."""
    run.config = config
    if run.heartbeat is not None:
        run.heartbeat.allow(config.training.rank_timeout)
        allow_collectives(config.training.rank_timeout)


def _conclude(asked: Asked, found: FoundRate) -> None:
    """Local, rank 0."""
    files = write_found(found)
    if asked.as_json:
        print(json.dumps(json_ready(found.as_dict()), indent=2, ensure_ascii=False), flush=True)
    else:
        print_found(found, files)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
