"""Tasks of lm-evaluation-harness (extra `eval`) on the model as it is: attached, quantised, split over the ranks.

The harness runs on every rank alike, with all requests; `Shared` divides their batches among the ranks and gives every rank all
answers. Written against lm_eval 0.4.13, whose `HFLM` makes prompts, limits and figures; the order of requests in a batch is ours.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError, unknown_name
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.figures import Measured
from dist_subspace.evaluation.measuring import storage_of
from dist_subspace.evaluation.model import open_subject
from dist_subspace.evaluation.results import ADAPTER, BASE, Evaluated
from dist_subspace.evaluation.scoring import heed
from dist_subspace.evaluation.subject import Subject
from dist_subspace.interchange.base_model import shown_name
from dist_subspace.placement.collectives import agreed, broadcast_object, gather_objects, world
from dist_subspace.stopping import STOP
from dist_subspace.subspace import disabled
from dist_subspace.training.display import Display

_BATCH = 8  # requests of a forward call, where nobody says how many
_ALL = 1 << 30  # what the harness takes for the size of a batch: it hands over all requests at once


def measure_tasks(asked: Asked, subject: Subject, display: Display) -> Evaluated:
    """Collective: the figures of every task, alike on every rank.

    Raises:
        UsageError: on every rank; the harness is missing, a task is not known or its data cannot be had, a model that writes no
            text.
    """
    if subject.config.model.task != "causal-lm":
        raise UsageError(
            f"--tasks is given, and model.task is {subject.config.model.task!r}; accepted: a language model (causal-lm)"
        )
    with agreed("reading the tasks"):
        manager = _manager(asked)
        _check_data(manager, asked.tasks)
    with STOP.leavable(), display.loading("reading the model") as progress:
        opened = open_subject(subject, progress, display.notice)
    try:
        lm = shared_lm(opened.model, opened.tokenizer, asked.batch_size or _BATCH)
        whose = [ADAPTER, BASE] if asked.compare_base else [BASE if subject.adapter is None else ADAPTER]
        about = {
            "adapter": None if subject.adapter is None else subject.name,
            "base": shown_name(opened.base),
            "storage": storage_of(opened.model),
            "data": ", ".join(asked.tasks),
        }
        found = Evaluated(about | {"samples": {}})
        for who in whose:
            what = f"measuring {', '.join(asked.tasks)} of the {who}"
            without = asked.compare_base and who == BASE
            with display.loading(what) as lm.progress, disabled(opened.model) if without else nullcontext():
                results, found.about["samples"] = _results(lm, asked, manager)
            found.figures[who] = results
    finally:
        opened.close()
    if asked.compare_base:
        found.difference = {
            name: Measured(ours.value - found.figures[BASE][name].value, None)
            for name, ours in found.figures[ADAPTER].items()
        }
    return found


def _manager(asked: Asked) -> Any:
    """Local: the tasks that are known, those of the folder first.

    Raises:
        UsageError: the harness is not installed, no such folder, or a task that nobody knows.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks needs lm-evaluation-harness, which is not installed; accepted: pip install dist-subspace[eval]"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    folder = asked.tasks_folder
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"--tasks-folder is {folder!r}, which is no folder; accepted: one with task files (*.yaml)")
    own = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
    if own is not None and all(name in own.all_tasks for name in asked.tasks):
        return own
    manager = TaskManager(include_path=folder)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            raise _unknown(name, manager.all_tasks, folder)
    return manager


def _unknown(name: str, known: Sequence[str], folder: str | None) -> UsageError:
    near = unknown_name("--tasks", name, known)
    hint = str(near).partition("; accepted:")[0]
    where = "" if folder is None else f", and of {folder}"
    return UsageError(
        f"{hint}; accepted: a task of lm-evaluation-harness ({len(known):,} names: lm_eval ls tasks){where}"
    )


def _check_data(manager: Any, names: Sequence[str]) -> None:
    """Local: the tasks with their data can be had."""
    try:
        manager.load(list(names))
    except Exception as error:  # what a task's own file, a reader of data or the Hub's client raises
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"--tasks is {', '.join(names)}, whose data cannot be had ({type(error).__name__}: {reason[:200]}); accepted: tasks "
            "whose data lies here (--tasks-folder), or a connection to the Hub"
        ) from error


def shared_lm(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Local: the harness's model of Hugging Face, around this one, whose requests are shared out over the ranks."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):  # type: ignore[misc]
        """Collective in every request: rank r runs the batches r, r + ranks, ...; one without a batch runs the shortest for
        nothing, so that all ranks make the same calls."""

        progress: Callable[[int, int], None]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Any]:
            def run(batch: list[Any]) -> list[Any]:
                return list(super(Shared, self)._loglikelihood_tokens(batch, True, len(batch)))

            return shared(requests, lambda request: len(request[1]) + len(request[2]), batch_size, run, self.progress)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            def run(batch: list[Any]) -> list[str]:
                return list(super(Shared, self).generate_until(batch, True))

            def length(request: Any) -> int:
                return len(self.tok_encode(request.args[0]))

            found: dict[int, str] = {}
            for numbers in _alike(requests):
                some = [requests[number] for number in numbers]
                texts = shared(some, length, batch_size, run, self.progress)
                found |= dict(zip(numbers, texts, strict=True))
            return [found[number] for number in range(len(requests))]

    tie = model.tie_weights
    model.tie_weights = lambda *args, **kwargs: None  # they are tied, and their places known to an engine
    try:
        return Shared(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=_ALL,
            logits_cache=False,
        )
    finally:
        if "tie_weights" in model.__dict__:
            del model.tie_weights
        assert model.tie_weights == tie


def _alike(requests: Sequence[Any]) -> list[list[int]]:
    """The numbers of requests that are answered with the same settings."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), []).append(number)
    return list(groups.values())


def shared(
    requests: Sequence[Any],
    length: Callable[[Any], int],
    batch_size: int,
    run: Callable[[list[Any]], list[Any]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Any]:
    """Collective: what `run` gives for every request, in their order, on every rank. Batches depend on the requests alone.

    Arguments:
        progress: called with (requests so far, requests in all).

    Raises:
        Interrupted: on every rank, between two batches, where one was told to stop.
    """
    order = sorted(range(len(requests)), key=lambda number: (-length(requests[number]), number))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own: list[tuple[int, Any]] = []
    for start in range(0, len(batches), world().size):
        heed()
        place = start + world().rank
        held = batches[place] if place < len(batches) else [order[-1]]
        results = run([requests[number] for number in held])
        if place < len(batches):
            own += zip(held, results, strict=True)
        progress(min(len(order), (start + world().size) * batch_size), len(order))
    found = dict(pair for of_rank in gather_objects(own) for pair in of_rank)
    return [found[number] for number in range(len(requests))]


def _results(lm: Any, asked: Asked, manager: Any) -> tuple[dict[str, Measured], dict[str, int]]:
    """Collective: (figures by `task figure`, number of samples by task)."""
    from lm_eval import simple_evaluate

    made = simple_evaluate(
        model=lm,
        tasks=list(asked.tasks),
        task_manager=manager,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        log_samples=False,
        bootstrap_iters=1000 if world().is_main else 0,
        verbosity=None,
    )
    results, counts = broadcast_object((made["results"], made["n-samples"]) if world().is_main else ({}, {}))
    figures = {
        f"{task} {name}": measured
        for task, values in results.items()
        for name, measured in task_figures(values).items()
    }
    return figures, {task: int(count["effective"]) for task, count in counts.items()}


def task_figures(values: dict[str, Any]) -> dict[str, Measured]:
    """The figures of one task by `metric` or `metric (filter)`, with the interval that its standard error gives."""
    found = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        half = 1.96 * error if isinstance(error, int | float) and math.isfinite(error) else None
        interval = None if half is None else (value - half, value + half)
        found[name if filtered == "none" else f"{name} ({filtered})"] = Measured(float(value), interval)
    return found
