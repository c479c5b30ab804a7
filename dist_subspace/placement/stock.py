"""A stock DeepSpeed JSON: its "auto" values filled in, its contradictions with the YAML found. Local."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from dist_subspace.errors import UsageError
from dist_subspace.placement.thresholds import ENGINE_MANNERS, zero_thresholds

AUTO = "auto"
# Values that DeepSpeed's optimizers and schedules have by these names in transformers.
_OPTIMIZERS = {
    "adam": ("adamw_torch", "adamw_torch_fused"),  # DeepSpeed's Adam decays weights as AdamW does
    "adamw": ("adamw_torch", "adamw_torch_fused"),
    "sgd": ("sgd",),
    "adagrad": ("adagrad",),
    "lion": ("lion_32bit",),
}
_SCHEDULERS = {
    "warmuplr": ("constant_with_warmup",),
    "warmupdecaylr": ("linear",),
    "warmupcosinelr": ("cosine",),
}
# Settings of the JSON's optimizer that choose its implementation only; ours is made from the YAML.
_IMPLEMENTATION = {"torch_adam", "adam_w_mode", "fused", "bias_correction"}


class Facts(TypedDict, total=False):
    """What the YAML says, as far as a DeepSpeed JSON can say it too. An absent one is not compared."""

    per_device_train_batch_size: int
    global_batch_size: int
    """Of the YAML; the JSON's own product counts empty micro-batches too."""
    rounds: int
    """Micro-batches of a rank in one step: ceil(global_batch_size / per_device_train_batch_size / world_size)."""
    world_size: int
    max_grad_norm: float
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    optim: str
    lr_scheduler_type: str
    warmup_steps: int
    """Whole steps; a ratio is resolved before."""
    max_steps: int
    """Steps of the whole run, resolved from epochs."""
    dtype: str
    """float32, bfloat16 or float16: the computation's type."""
    trainable_numel: int
    block_numel: int
    """Stored elements of one decoder block; 0 where unknown."""


def read_deepspeed(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict of its own.

    Raises:
        UsageError: no such file, not JSON (the line is named), or not a mapping.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    try:
        loaded = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"deepspeed.config is {str(source)!r}, which cannot be read ({reason})") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"deepspeed.config is {str(source)!r}, which is not JSON at line {error.lineno}: {error.msg}"
        ) from error
    if not isinstance(loaded, dict):
        raise UsageError(f"deepspeed.config is {str(source)!r}, which holds no mapping; accepted: a DeepSpeed JSON")
    return loaded


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 where none is named.

    Raises:
        UsageError: a stage that does not exist.
    """
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, Mapping) else section
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UsageError(f"deepspeed.config zero_optimization.stage is {stage!r}; accepted: 0, 1, 2, 3")
    return int(stage)


def stock_training_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """What the JSON's optimizer and scheduler are called in the YAML, for keys that the YAML leaves open.

    Raises:
        UsageError: an optimizer or scheduler that has no counterpart.
    """
    found = {}
    for section, key, names in _NAMED:
        kind = _type_of(config, section)
        if kind is not None:
            found[f"training.{key}"] = _counterparts(section, kind, names)[0]
    return found


def stock_config(source: Mapping[str, Any] | str | Path, facts: Facts) -> dict[str, Any]:
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
    for section, key, names in _NAMED:
        _check_type(config, facts, section, key, names)
    for entry, yaml_key, value in _counterpart_values(facts):
        _match(config, entry, yaml_key, value)
    _check_batch(config, facts)
    _check_warmup(config, facts)
    _refuse_ignored(config)
    _fill_precision(config, facts)
    _fill_thresholds(config, facts)
    for key, manner in ENGINE_MANNERS.items():
        config.setdefault(key, manner)
    _refuse_left_auto(config)
    return config


def engine_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without its optimizer and scheduler, which the training loop makes from the same values itself.

    An engine that finds a scheduler in its configuration would make and move a second one.
    """
    return {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}


_NAMED = (("optimizer", "optim", _OPTIMIZERS), ("scheduler", "lr_scheduler_type", _SCHEDULERS))


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
    config: dict[str, Any], facts: Facts, section: str, key: str, names: Mapping[str, tuple[str, ...]]
) -> None:
    kind, given = _type_of(config, section), facts.get(key)
    if kind is not None and given is not None and given not in _counterparts(section, kind, names):
        raise _contradiction(f"{section}.type", kind, f"training.{key}", given)


def _counterpart_values(facts: Facts) -> Iterator[tuple[str, str, Any]]:
    """(entry of the JSON, key of the YAML, value of the YAML) for what must be equal."""
    pairs = (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_clipping", "max_grad_norm"),
        ("optimizer.params.lr", "learning_rate"),
        ("optimizer.params.eps", "adam_epsilon"),
        ("optimizer.params.weight_decay", "weight_decay"),
        ("scheduler.params.warmup_max_lr", "learning_rate"),
        ("scheduler.params.total_num_steps", "max_steps"),
    )
    for entry, key in pairs:
        if key in facts:
            yield entry, f"training.{key}", facts[key]  # type: ignore[literal-required]
    if "adam_beta1" in facts and "adam_beta2" in facts:
        betas = [facts["adam_beta1"], facts["adam_beta2"]]
        yield "optimizer.params.betas", "training.adam_beta1, training.adam_beta2", betas


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
    """Compare with the YAML's global batch, then put in what the engine counts: empty micro-batches are rounds too."""
    if "global_batch_size" not in facts:
        return
    micro, rounds, ranks = facts["per_device_train_batch_size"], facts["rounds"], facts["world_size"]
    _match(config, "train_batch_size", "training.global_batch_size", facts["global_batch_size"])
    given = config.get("gradient_accumulation_steps", AUTO)
    if given not in (AUTO, rounds):
        note = f" on {ranks} ranks with micro-batches of {micro}, which makes {rounds}"
        raise _contradiction(
            "gradient_accumulation_steps", given, "training.global_batch_size", facts["global_batch_size"], note
        )
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = rounds
    config["train_batch_size"] = micro * rounds * ranks
    if "max_grad_norm" in facts:
        config.setdefault("gradient_clipping", float(facts["max_grad_norm"]))


def _check_warmup(config: dict[str, Any], facts: Facts) -> None:
    """Our schedules rise in a straight line from 0; DeepSpeed's take at least one step."""
    params = config.get("scheduler", {}).get("params", {})
    for key, ours in (("warmup_min_lr", 0), ("warmup_min_ratio", 0), ("warmup_type", "linear")):
        _match(config, f"scheduler.params.{key}", "the start of the schedule", ours)
    if "warmup_steps" not in facts or "warmup_num_steps" not in params:
        return
    given, steps = params["warmup_num_steps"], facts["warmup_steps"]
    if given not in (AUTO, steps, max(1, steps)):
        raise _contradiction("scheduler.params.warmup_num_steps", given, "training.warmup_steps", steps)
    params["warmup_num_steps"] = max(1, steps)


_KNOWN_PARAMS = {
    "optimizer": {"lr", "betas", "eps", "weight_decay"} | _IMPLEMENTATION,
    "scheduler": {
        *("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type", "warmup_min_ratio"),
        "last_batch_iteration",
    },
}
_INSTEAD = {"optimizer": "training.optim", "scheduler": "training.lr_scheduler_kwargs"}


def _refuse_ignored(config: Mapping[str, Any]) -> None:
    """A setting that nobody would read is an error, not a silent change of the run."""
    for section, known in _KNOWN_PARAMS.items():
        for key, value in config.get(section, {}).get("params", {}).items():
            if key not in known and not callable(value):
                raise UsageError(
                    f"deepspeed.config {section}.params.{key} is {value!r}, which has no effect here; "
                    f"set {_INSTEAD[section]} in the YAML instead"
                )


def _fill_precision(config: dict[str, Any], facts: Facts) -> None:
    """bf16 on "auto" is off: the engine stays in fp32; fp16 on "auto" follows the computation, for the loss scaler."""
    values: dict[str, Callable[[], bool]] = {
        "bf16.enabled": lambda: False,
        "bfloat16.enabled": lambda: False,
        "fp16.enabled": lambda: facts.get("dtype") == "float16",
    }
    for entry, value in values.items():
        node, key = _node(config, entry)
        if node is not None and node.get(key) == AUTO:
            node[key] = value()


def _fill_thresholds(config: dict[str, Any], facts: Facts) -> None:
    """Thresholds on "auto", and absent ones; every other "auto" of the section is left to DeepSpeed's default."""
    section = config.get("zero_optimization")
    if section is None:
        return
    ours = zero_thresholds(zero_stage(config), facts.get("trainable_numel", 0), facts.get("block_numel", 0))
    for key in [key for key, value in section.items() if value == AUTO]:
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
