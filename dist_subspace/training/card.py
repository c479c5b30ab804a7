"""What a run knows for the card of its adapter. Local: rank 0 alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_subspace.config import Config
from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.interchange.card_training import Training, data_name, is_data_set, license_of
from dist_subspace.placement.collectives import world
from dist_subspace.run_folder.metrics import evaluation_lines, read_lines
from dist_subspace.run_folder.records import EVALUATED
from dist_subspace.training.plan import Plan
from dist_subspace.training.progress import Progress
from dist_subspace.training.sections import data_settings


def training_of(plan: Plan, progress: Progress, curve: Path | None) -> Training:
    """Everything that a card says of the run.

    Arguments:
        curve: the picture of the loss, which lies beside the card too.
    """
    sources = [path for path, _ in data_settings(plan.config.data).sources()]
    figures = _figures(plan, progress)
    return Training(
        facts=_facts(plan, progress),
        datasets=tuple(source for source in sources if is_data_set(source)),
        figures=figures,
        measured_on=_held_out(plan.config, sources) if figures else "",
        picture=None if curve is None else curve.name,
        license=license_of(plan.model_folder),
    )


def edited_card(adapter: Path) -> str | None:
    """The card of an earlier end of the run, where a person has edited it since."""
    try:
        card = (adapter / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if is_unedited(card) else card


def _figures(plan: Plan, progress: Progress) -> dict[str, float]:
    """Of the evaluation at the adapter's step."""
    step = progress.best["step"] if progress.best else progress.step
    measured = [line for line in evaluation_lines(read_lines(plan.run_dir)) if line.step == step]
    values = measured[-1].values if measured else {}
    numbers = {key.removeprefix(EVALUATED): value for key, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _held_out(config: Config, sources: list[str]) -> str:
    held_out = config.data.eval
    if isinstance(held_out, float):
        return f"{held_out:.3g} of {', '.join(map(data_name, sources))}, held out"
    return data_name(str(held_out))


def _facts(plan: Plan, progress: Progress) -> dict[str, Any]:
    config = plan.config
    sources = [path for path, _ in data_settings(config.data).sources()]
    return {
        "data": [data_name(source) for source in sources],
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "global batch size": config.training.global_batch_size,
        "learning rate": config.training.learning_rate,
        "schedule": config.training.lr_scheduler_type,
        "storage of the frozen weights": config.model.storage,
        "DeepSpeed": _engine(config),
        "ranks": world().size,
        "seed": config.training.seed,
    }


def _engine(config: Config) -> str:
    stock = config.deepspeed.config
    return (
        config.deepspeed.preset
        if stock is None
        else Path(stock).name
        if isinstance(stock, str)
        else "a JSON of its own"
    )
