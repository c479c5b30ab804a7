"""One evaluation: samples are read, the model is loaded, every measurement is made block by block, and figures are made of all
results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from dist_subspace.checkpoint.fingerprint import file_fingerprint
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.figures import ANSWERS, CLASSES, LIKELIHOOD, METRICS, difference, measured
from dist_subspace.evaluation.measurements import BLOCK, Measurement, OfAnswers, OfChoices, OfSamples, blocks
from dist_subspace.evaluation.model import Subjected, open_subject
from dist_subspace.evaluation.predictions import Line, Predictions
from dist_subspace.evaluation.reading import Material, read_material
from dist_subspace.evaluation.results import ADAPTER, BASE, Evaluated
from dist_subspace.evaluation.scoring import Batching
from dist_subspace.evaluation.subject import Subject
from dist_subspace.generation.settings import greedy
from dist_subspace.interchange.base_model import shown_name
from dist_subspace.interchange.description import WEIGHTS
from dist_subspace.metrics.answers import answer_pattern
from dist_subspace.placement.collectives import broadcast_object, on_main
from dist_subspace.stopping import STOP
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import disabled
from dist_subspace.training.data.prompting import Prompting
from dist_subspace.training.display import Display
from dist_subspace.training.sections import data_settings, padding

Of = dict[str, list[dict[str, Any]]]  # kind -> a result a sample


def measure(asked: Asked, subject: Subject, display: Display) -> Evaluated:
    """Collective: what is asked, of the adapter, the base, or both; alike on every rank.

    Raises:
        UsageError: on every rank; what cannot be read, loaded or measured here. Interrupted: on every rank; the process was told
            to stop, and the file of predictions holds whole blocks.
    """
    with STOP.leavable():
        material = on_main(read_material, asked, subject, display.enabled, display.notice)
        with display.loading("reading the model") as progress:
            opened = open_subject(material.subject, progress, display.notice)
    with ExitStack() as stack:
        stack.callback(opened.close)
        plan = _measurements(asked, material, opened)
        lines = kept_by_main(_open_predictions, asked, material, opened)
        if lines is not None:
            stack.callback(lines.close)
        results = _all_results(asked, plan, opened, lines, display)
    return _figures(material, opened, results)


def kept_by_main(function: Callable[..., Any], *args: Any) -> Any:
    """Collective: what the function gives on rank 0, which alone keeps it; an error is everyone's."""
    kept: list[Any] = []

    def keep() -> None:
        kept.append(function(*args))

    on_main(keep)
    return kept[0] if kept else None


def _measurements(asked: Asked, material: Material, opened: Subjected) -> list[Measurement]:
    config, made = material.subject.config, list[Measurement]()
    training = config.training
    size = asked.batch_size or training.per_device_eval_batch_size or training.per_device_train_batch_size
    how = Batching(size, opened.pad_id, padding(config), opened.device)
    if asked.needs(material.metrics, LIKELIHOOD, CLASSES):
        made.append(OfSamples(material.samples, how, tuple(material.subject.labels or ())))
    if material.choices is not None:
        made.append(OfChoices(material.choices, how))
    if asked.needs(material.metrics, ANSWERS):
        stops = Prompting(data_settings(config.data), opened.tokenizer).stops()
        pattern = None if asked.answer_regex is None else answer_pattern(asked.answer_regex)
        generation = partial(greedy, stops=stops, max_new_tokens=asked.max_new_tokens)
        made.append(OfAnswers(material.samples, opened.tokenizer, generation, pattern, asked.batch_size or 8))
    return made


def _open_predictions(asked: Asked, material: Material, opened: Subjected) -> Predictions | None:
    """Local: the file, with what it holds already of this evaluation."""
    if asked.predictions is None:
        return None
    subject = material.subject
    of = {
        "adapter": None if subject.adapter is None else file_fingerprint(subject.adapter / WEIGHTS),
        "base": opened.base,
        "storage": storage_of(opened.model),
        "data": material.samples.fingerprint,
        "samples": len(material.samples.table),
        "metrics": list(material.metrics),
        "choices": [list(asked.choices.texts), asked.choices.field, asked.choices.answer_field],
        "answers": [asked.answer_regex, asked.max_new_tokens],
        "batch size": asked.batch_size,
        "compare base": asked.compare_base,
    }
    return Predictions(asked.predictions, of)


def _all_results(
    asked: Asked, plan: list[Measurement], opened: Subjected, lines: Predictions | None, display: Display
) -> dict[str, Of]:
    """Collective: every measurement of the adapter, then of the base; what the file holds already is not made again."""
    known: list[Line] = broadcast_object(lines.lines if lines is not None else [])
    whose = [ADAPTER, BASE] if asked.compare_base else [BASE if asked.base is not None else ADAPTER]
    results: dict[str, Of] = {who: {} for who in whose}
    done = 0
    for who in whose:
        with disabled(opened.model) if asked.compare_base and who == BASE else nullcontext():
            for measurement in plan:
                held = _held(known[done:], who, measurement)
                if lines is not None and len(held) < len(measurement):
                    lines.keep(done + len(held))
                results[who][measurement.kind] = _results(who, measurement, opened, held, lines, display)
                done += len(measurement)
    return results


def _held(known: list[Line], who: str, measurement: Measurement) -> list[Line]:
    """The results that the lines begin with, whole blocks of them."""
    of_it = [(line["of"], line["kind"]) == (who, measurement.kind) for line in known[: len(measurement)]]
    count = of_it.index(False) if False in of_it else len(of_it)
    return known[: count if count == len(measurement) else count // BLOCK * BLOCK]


def _results(
    who: str, measurement: Measurement, opened: Subjected, held: list[Line], lines: Predictions | None, display: Display
) -> list[dict[str, Any]]:
    """Collective: every result of a measurement, those that are there already first."""
    made: list[dict[str, Any]] = list(held)
    with display.loading(f"measuring {measurement.kind} of the {who}") as progress:
        for block in blocks(len(measurement), first=len(made)):
            found = measurement.results(opened.model, block)
            named = [{"of": who, "kind": measurement.kind, **result} for result in found]
            on_main(_write, lines, named)
            made += named
            progress(len(made), len(measurement))
    return made


def _write(lines: Predictions | None, block: list[Line]) -> None:
    if lines is not None:
        lines.write(block)


def _figures(material: Material, opened: Subjected, results: dict[str, Of]) -> Evaluated:
    """Local: from all results."""
    subject, metrics = material.subject, material.metrics
    labels = subject.labels or []
    about = {
        "adapter": None if subject.adapter is None else subject.name,
        "base": shown_name(opened.base),
        "storage": storage_of(opened.model),
        "data": material.samples.name,
        "samples": {kind: len(of_kind) for kind, of_kind in next(iter(results.values())).items()},
    }
    evaluated = Evaluated(about)
    for who, found in results.items():
        evaluated.figures[who] = {name: measured(name, _of(found, name), labels) for name in metrics}
    if len(results) == 2:
        ours, others = results[ADAPTER], results[BASE]
        evaluated.difference = {name: difference(name, _of(ours, name), _of(others, name), labels) for name in metrics}
    return evaluated


def _of(found: Of, name: str) -> list[dict[str, Any]]:
    """The results that a figure is made of."""
    return next(found[kind] for kind in METRICS[name].kinds if kind in found)


def storage_of(model: Any) -> str:
    """How most of the frozen weights are held."""
    held = [module.storage for module in model.modules() if isinstance(module, FrozenLinear)]
    return max(set(held), key=held.count) if held else str(model.dtype).removeprefix("torch.")
