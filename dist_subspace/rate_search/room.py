"""The configuration of the short runs: the run's own in all that decides what is trained on what, in a folder of the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.placement.engines import without_training_sections
from dist_subspace.rate_search.grid import STEPS, WARMUP
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.data.table import drawn
from dist_subspace.training.plan import Plan, check_schedule
from dist_subspace.training.schedule import warmup_count


def search_config(config: Config, folder: RunFolder) -> Config:
    """The run's configuration without what is its own: folder, checkpoints, trackers, limits of time, early stopping.

    The schedule is a warm-up, then constant. How long a rate will go on is not known while it is tried, and a schedule that falls
    needs to know it.

    Raises:
        UsageError: there are no held-out data, by which rates could be compared.
    """
    if config.data.eval is None:
        raise UsageError(
            "data.eval is null, and learning rates are compared by the loss on held-out data; accepted: a file, or a fraction of "
            "the training data, such as data.eval=0.05"
        )
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}
    training = {"on_nonfinite": "skip", "early_stopping_patience": None, "max_time": None, **schedule}
    run = {"output_dir": str(folder), "report_to": (), "sample_prompts": (), "push_to_hub": None, "profile": None}
    given = config.deepspeed.config
    changes: dict[str, dict[str, Any]] = {
        "training": training,
        "deepspeed": {"config": None if given is None else without_training_sections(given)},
        "checkpoint": {"resume": "none", "metric_for_best_model": None, "allow_different": ()},
        "run": run,
    }
    return _changed(config, changes)


def search_plan(plan: Plan, steps: int | None, eval_samples: int) -> Plan:
    """The plan of the run as one of a rate that gets to the last rung, with fewer held-out samples.

    Arguments:
        steps: asked for; unset: the usual number. The run's own are never exceeded.

    Raises:
        UsageError: the method's schedule does not fit into so few steps.
    """
    total = min(steps or STEPS, plan.total_steps)
    try:
        check_schedule(plan.resolved, total)
    except UsageError as error:
        raise UsageError(f"{error} (max_steps is that of find-lr: set --steps)") from error
    warmup = warmup_count(WARMUP, total)
    config = _changed(plan.config, {"training": {"max_steps": total, "num_train_epochs": None, "warmup_steps": warmup}})
    assert plan.data.eval is not None  # search_config has looked
    held_out = drawn(plan.data.eval, eval_samples, config.training.seed)
    return replace(plan, config=config, total_steps=total, data=replace(plan.data, eval=held_out))


def _changed(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)
