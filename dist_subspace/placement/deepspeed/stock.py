"""A stock DeepSpeed JSON: its "auto" values filled in, its contradictions with the YAML found. Local."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.placement.deepspeed.json_file import read_deepspeed, zero_stage
from dist_subspace.placement.deepspeed.secondary import KEY
from dist_subspace.placement.deepspeed.thresholds import ENGINE_MANNERS, zero_thresholds
from dist_subspace.placement.facts import Facts

AUTO = "auto"
# Values that DeepSpeed's optimizers and schedules have by these names in transformers.
OPTIMIZERS = {
    "adam": ("adamw_torch", "adamw_torch_fused"),  # DeepSpeed's Adam decays weights as AdamW does
    "adamw": ("adamw_torch", "adamw_torch_fused"),
    "sgd": ("sgd",),
    "adagrad": ("adagrad",),
    "lion": ("lion_32bit",),
}
SCHEDULERS = {
    "warmuplr": ("constant_with_warmup",),
    "warmupdecaylr": ("linear",),
    "warmupcosinelr": ("cosine",),
}
# Settings of the JSON's optimizer that choose its implementation only; ours is made from the YAML.
_IMPLEMENTATION = {"torch_adam", "fused"}


def stock_training_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON's optimizer and scheduler are called in the YAML, and the learning rate that they name, for keys that the
    YAML leaves open.

    Raises:
        UsageError: an optimizer or scheduler that has no counterpart.
    """
    training_keys: dict[str, Any] = {}
    for section, key, names in (("optimizer", "optim", OPTIMIZERS), ("scheduler", "lr_scheduler_type", SCHEDULERS)):
        kind = _type_of(config, section)
        if kind is not None:
            training_keys[f"training.{key}"] = _counterparts(section, kind, names)[0]
    for entry in ("scheduler.params.warmup_max_lr", "optimizer.params.lr"):
        node, key = _node(dict(config), entry)
        if node is not None and isinstance(node.get(key), int | float):
            training_keys["training.learning_rate"] = float(node[key])
    return training_keys


def stock_config(source: Mapping[str, Any] | str | Path, facts: Facts) -> dict[str, Any]:
    """What the engine is given for a stock JSON: `resolve_stock` without optimizer and scheduler.

    The training loop makes these from the same values itself; an engine that finds a scheduler in its configuration would
    make a second one, and move it.

    Raises:
        UsageError: as `resolve_stock`.
    """
    return {k: v for k, v in resolve_stock(source, facts).items() if k not in ("optimizer", "scheduler")}


def resolve_stock(source: Mapping[str, Any] | str | Path, facts: Facts) -> dict[str, Any]:
    """The JSON with every "auto" resolved, as Hugging Face's Trainer resolves them, and checked against the YAML.

    Differences to the Trainer: thresholds that are "auto" or absent become the presets' (they count packed bytes here);
    bf16 on "auto" stays off, because an engine in fp32 leaves a 16-bit model as it is and keeps adapters in fp32; batch
    numbers become what the engine will see, empty micro-batches included.

    Raises:
        UsageError: the JSON and the YAML contradict one another (both keys and values are named), or an "auto" stands
            where none is known.
    """
    config = read_deepspeed(source)
    _check_sections(config)
    _check_type(config, "optimizer", "training.optim", facts.optim, OPTIMIZERS)
    _check_type(config, "scheduler", "training.lr_scheduler_type", facts.lr_scheduler_type, SCHEDULERS)
    for entry, yaml_key, value in _equal_values(facts):
        _match(config, entry, yaml_key, value)
    _check_batch(config, facts)
    _check_warmup(config, facts.warmup_steps)
    _refuse_ignored(config)
    _fill_precision(config, facts.dtype)
    _fill_thresholds(config, facts)
    _refuse_left_auto(config)
    return dict(ENGINE_MANNERS) | config


def _check_sections(config: Mapping[str, Any]) -> None:
    for key in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "bfloat16"):
        if key in config and not isinstance(config[key], Mapping):
            raise UsageError(f"deepspeed.config {key} is {config[key]!r}; accepted: a mapping")
    for key in ("optimizer", "scheduler"):
        params = config.get(key, {}).get("params", {})
        if not isinstance(params, Mapping):
            raise UsageError(f"deepspeed.config {key}.params is {params!r}; accepted: a mapping")
    zero_stage(config)


def _type_of(config: Mapping[str, Any], section: str) -> str | None:
    kind = config.get(section, {}).get("type")
    return None if kind in (None, AUTO) else str(kind)


def _counterparts(section: str, kind: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if kind.lower() not in names:
        raise UsageError(
            f"deepspeed.config {section}.type is {kind!r}, which is not offered; accepted: {', '.join(names)}"
        )
    return names[kind.lower()]


def _check_type(
    config: Mapping[str, Any], section: str, yaml_key: str, given: str | None, names: Mapping[str, tuple[str, ...]]
) -> None:
    kind = _type_of(config, section)
    if kind is not None and given not in (None, *_counterparts(section, kind, names)):
        raise _contradiction(f"{section}.type", kind, yaml_key, given)


def _equal_values(facts: Facts) -> tuple[tuple[str, str, Any], ...]:
    """(entry of the JSON, key of the YAML, value of the YAML) for what must be equal."""
    return (
        ("train_micro_batch_size_per_gpu", "training.per_device_train_batch_size", facts.micro_batch),
        ("train_batch_size", "training.global_batch_size", facts.global_batch),
        ("gradient_clipping", "training.max_grad_norm", facts.max_grad_norm),
        ("optimizer.params.lr", "training.learning_rate", facts.learning_rate),
        ("optimizer.params.betas", "training.adam_beta1, training.adam_beta2", list(facts.betas)),
        ("optimizer.params.eps", "training.adam_epsilon", facts.epsilon),
        ("optimizer.params.weight_decay", "training.weight_decay", facts.weight_decay),
        ("optimizer.params.adam_w_mode", "the decay of weights apart from their gradient", True),
        ("optimizer.params.bias_correction", "the bias correction of every Adam", True),
        ("scheduler.params.warmup_max_lr", "training.learning_rate", facts.learning_rate),
        ("scheduler.params.total_num_steps", "the run's number of steps", facts.total_steps),
        ("scheduler.params.warmup_min_lr", "the start of every schedule", 0),
        ("scheduler.params.warmup_min_ratio", "the start of every schedule", 0),
        ("scheduler.params.warmup_type", "the rise of every schedule", "linear"),
    )


def _match(config: dict[str, Any], entry: str, yaml_key: str, value: Any) -> None:
    """Fill an "auto"; refuse another value than the YAML's. An entry that is absent stays absent."""
    node, key = _node(config, entry)
    if node is None or key not in node:
        return
    if node[key] == AUTO:
        node[key] = value
    elif not _same(node[key], value):
        raise _contradiction(entry, node[key], yaml_key, value)


def _node(config: dict[str, Any], entry: str) -> tuple[dict[str, Any] | None, str]:
    *sections, key = entry.split(".")
    node: Any = config
    for section in sections:
        node = node.get(section)
        if not isinstance(node, dict):
            return None, key
    return node, key


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)


def _contradiction(entry: str, stock: Any, yaml_key: str, value: Any, note: str = "") -> UsageError:
    return UsageError(
        f"deepspeed.config {entry} is {stock!r}, but {yaml_key} is {value!r}{note}; "
        f'accepted: equal values, or "auto" in the JSON'
    )


def _check_batch(config: dict[str, Any], facts: Facts) -> None:
    """Put in what the engine counts: it sees every rank run every round, the empty micro-batches too."""
    given = config.get("gradient_accumulation_steps", AUTO)
    if given not in (AUTO, facts.rounds):
        note = f" in micro-batches of {facts.micro_batch} on {facts.world_size} ranks, which makes {facts.rounds}"
        raise _contradiction(
            "gradient_accumulation_steps", given, "training.global_batch_size", facts.global_batch, note
        )
    config["train_micro_batch_size_per_gpu"] = facts.micro_batch
    config["gradient_accumulation_steps"] = facts.rounds
    config["train_batch_size"] = facts.micro_batch * facts.rounds * facts.world_size
    config.setdefault("gradient_clipping", facts.max_grad_norm)


def _check_warmup(config: dict[str, Any], steps: int) -> None:
    """DeepSpeed's schedules take at least one step of warm-up, so 1 stands for none."""
    params = config.get("scheduler", {}).get("params", {})
    if "warmup_num_steps" not in params:
        return
    if params["warmup_num_steps"] not in (AUTO, steps, max(1, steps)):
        raise _contradiction(
            "scheduler.params.warmup_num_steps", params["warmup_num_steps"], "training.warmup_steps", steps
        )
    params["warmup_num_steps"] = max(1, steps)


_KNOWN_PARAMS = {
    "optimizer": {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction"} | _IMPLEMENTATION,
    "scheduler": {
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_num_steps",
        "total_num_steps",
        "warmup_type",
        "warmup_min_ratio",
        "last_batch_iteration",
    },
}
_INSTEAD = {"optimizer": "training.optim", "scheduler": "training.lr_scheduler_kwargs"}


def _refuse_ignored(config: Mapping[str, Any]) -> None:
    """A setting that nobody would read is an error, not a silent change of the run."""
    for section, known in _KNOWN_PARAMS.items():
        for key, value in config.get(section, {}).get("params", {}).items():
            if key not in known:
                raise UsageError(
                    f"deepspeed.config {section}.params.{key} is {value!r}, which has no effect here; "
                    f"set {_INSTEAD[section]} in the YAML instead"
                )


def _fill_precision(config: dict[str, Any], dtype: str) -> None:
    """bf16 on "auto" is off: the engine stays in fp32; fp16 on "auto" follows the computation, for the loss scaler."""
    for section, enabled in (("bf16", False), ("bfloat16", False), ("fp16", dtype == "float16")):
        if config.get(section, {}).get("enabled") == AUTO:
            config[section]["enabled"] = enabled


def _fill_thresholds(config: dict[str, Any], facts: Facts) -> None:
    """Thresholds on "auto", and absent ones; every other "auto" of the section is left to DeepSpeed's default, but for the size
    of second shards, which would be none."""
    section = config.get("zero_optimization")
    if section is None:
        return
    ours = zero_thresholds(zero_stage(config), facts.trainable_numel, facts.block_numel)
    for key in [key for key, value in section.items() if value == AUTO and key != KEY]:
        del section[key]
    config["zero_optimization"] = ours | section


def _refuse_left_auto(config: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_left_auto(value, f"{prefix}{key}.")
        elif value == AUTO:
            raise UsageError(
                f'deepspeed.config {prefix}{key} is "auto", which is not known for this key; accepted: a value'
            )
