"""Rules over more than one key, and the forms of a value that are accepted beside the plain one."""

from __future__ import annotations

from typing import Any

from dist_subspace.config.schema import Config
from dist_subspace.errors import UsageError

DEFAULT_STEPS = 1000


def normalised(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Fill in what depends on other keys: the name of the run, the number of steps, `warmup_ratio`, a single tracker.

    Raises:
        UsageError: for keys that contradict each other.
    """
    values = {key: dict(section) if isinstance(section, dict) else section for key, section in values.items()}
    training, run = values.setdefault("training", {}), values.setdefault("run", {})
    if not run.get("output_dir"):
        run["output_dir"] = f"runs/{name}"
    if isinstance(run.get("report_to"), str) or run.get("report_to", "") is None:
        run["report_to"] = [run["report_to"] or "none"]
    if "warmup_ratio" in training:
        if "warmup_steps" in training:
            raise UsageError("training.warmup_ratio and training.warmup_steps are both given; accepted: one of them")
        training["warmup_steps"] = training.pop("warmup_ratio")
    if training.get("num_train_epochs") is not None and training.get("max_steps") is not None:
        raise UsageError(
            f"training.max_steps is {training['max_steps']!r} and training.num_train_epochs is "
            f"{training['num_train_epochs']!r}; accepted: one of them"
        )
    if training.get("num_train_epochs") is None and training.get("max_steps") is None:
        training["max_steps"] = DEFAULT_STEPS
    training["max_time"] = _seconds(training.get("max_time"))
    return values


def check_rules(config: Config) -> None:
    """What one key allows another.

    Raises:
        UsageError: naming both.
    """
    training = config.training
    if training.global_batch_size % training.per_device_train_batch_size:
        raise UsageError(
            f"training.global_batch_size is {training.global_batch_size}, which is no multiple of "
            f"training.per_device_train_batch_size {training.per_device_train_batch_size}"
        )
    if training.warmup_steps >= 1 and training.warmup_steps != int(training.warmup_steps):
        raise UsageError(f"training.warmup_steps is {training.warmup_steps}; accepted: whole steps, or a share below 1")
    if config.deepspeed.preset == "zero3-nvme" and config.deepspeed.config is None and not config.deepspeed.nvme_path:
        raise UsageError(
            "deepspeed.preset is 'zero3-nvme', which needs deepspeed.nvme_path, a folder on a fast local disk"
        )
    if isinstance(config.data.eval, float) and not 0 < config.data.eval < 1:
        raise UsageError(f"data.eval is {config.data.eval}; accepted: a file, or a fraction between 0 and 1")


def _seconds(value: Any) -> Any:
    """`hh:mm:ss` in seconds; anything else as it is, for the schema to judge."""
    if not isinstance(value, str):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise UsageError(f"training.max_time is {value!r}; accepted: seconds above 0, or hh:mm:ss")
        return value
    try:
        hours, minutes, seconds = (float(part) for part in value.split(":"))
    except ValueError:
        raise UsageError(f"training.max_time is {value!r}; accepted: seconds above 0, or hh:mm:ss") from None
    return 3600 * hours + 60 * minutes + seconds
