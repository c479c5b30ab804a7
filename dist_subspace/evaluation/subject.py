"""What is measured: an adapter, found from a configuration, a run or a folder, or a base model alone; and by which configuration
its data is read. Local."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_subspace.adapted.source import Source, find_source
from dist_subspace.config import Config, load_config
from dist_subspace.errors import UsageError
from dist_subspace.interchange.base_model import shown_name
from dist_subspace.interchange.peft.importing import read_peft
from dist_subspace.loading.load import model_config, resolve_folder
from dist_subspace.run_folder.folder import RunFolder, adapter_labels
from dist_subspace.training.data.settings import PROMPTS


@dataclass(frozen=True)
class Subject:
    """adapter: what `open_adapted` opens, None for a base alone; run: the run that it is in, None for a folder by itself; labels:
    the names of the classes by id, where samples are classified; given: the keys that overrides name."""

    config: Config
    adapter: Path | None
    run: RunFolder | None
    labels: list[str] | None
    given: frozenset[str]

    def with_config(self, config: Config) -> Subject:
        return replace(self, config=config)

    @property
    def name(self) -> str:
        return shown_name(self.adapter if self.adapter is not None else self.config.model.path)

    @property
    def storage(self) -> str | None:
        """Of the frozen weights, where it is given; else that of the training."""
        return self.config.model.storage if "model.storage" in self.given else None

    @property
    def preset(self) -> str | None:
        return self.config.deepspeed.preset if "deepspeed.preset" in self.given else None

    @property
    def base(self) -> str | None:
        """Where the base lies, where it is given; else the one that the adapter names."""
        return self.config.model.path if self.adapter is None or "model.path" in self.given else None


def find_subject(
    target: str | None, base: str | None, data: str | None, overrides: Sequence[str], *, tasks: bool = False
) -> Subject:
    """Local: what the command line means.

    Arguments:
        tasks: the data is that of tasks, and no configuration says how it is written.

    Raises:
        UsageError: neither a target nor a base, or both; no adapter; data that nobody names.
    """
    if base is not None and target is not None and "=" in target:  # the first override stands where a target would
        overrides, target = [target, *overrides], None
    if (target is None) == (base is None):
        both = "both a target and --base are given" if base is not None else "nothing to evaluate is named"
        raise UsageError(f"{both}; accepted: a configuration, a run or an adapter, or --base MODEL")
    given = frozenset(override.partition("=")[0].strip() for override in overrides)
    _check_effective(given, _OF_BASE if base is not None else _OF_ADAPTER)
    if data is not None:
        if "data.eval" in given:
            raise UsageError("both --data and an override of data.eval are given; accepted: one of them")
        overrides = [*overrides, f"data.eval={_quoted(data)}"]
    if tasks and "data.format" not in given:  # which nothing is read by
        overrides = ["data.format=text", *overrides]
        given |= {"data.format"}
    if base is not None:
        return _of_base(base, data, overrides, given)
    assert target is not None  # one of the two is given
    return _of_target(Path(target), data, overrides, given)


# Keys that an evaluation reads; the others say how to train, or how an adapter's base was held.
_OF_BOTH = (
    "data.",
    "deepspeed.preset",
    "deepspeed.nvme_path",
    "run.output_dir",
    "training.per_device_eval_batch_size",
    "training.per_device_train_batch_size",
    "training.rank_timeout",
    "training.seed",
)
_OF_ADAPTER = (*_OF_BOTH, "model.path", "model.storage")
_OF_BASE = (*_OF_BOTH, "model.")


def _check_effective(given: frozenset[str], read: Sequence[str]) -> None:
    """Raises UsageError for an override that would change nothing."""
    for key in sorted(given):
        if "." in key and not any(key == name or (name.endswith(".") and key.startswith(name)) for name in read):
            names = ", ".join(f"{name}*" if name.endswith(".") else name for name in read)
            raise UsageError(f"the override {key} changes nothing that is measured; accepted: {names}")


def _of_target(target: Path, data: str | None, overrides: Sequence[str], given: frozenset[str]) -> Subject:
    if target.is_file():
        config = load_config(target, overrides)
        run = RunFolder(config.run.output_dir)
        source = _adapter_of_run(run, f"the run of {target}")
        stated = {f"model.{key}" for key in ("path", "storage") if key in config.model.model_fields_set}
        return Subject(config, source.adapter.path, run, _labels(source), given | stated)
    if RunFolder(target).config.is_file():
        source = _adapter_of_run(RunFolder(target), str(target))
    else:
        source = find_source(target)
    if source.sections:
        run = RunFolder(source.adapter.path.resolve().parent)
        config = load_config(run.config, overrides)
        return Subject(config, source.adapter.path, run, _labels(source), given)
    return Subject(_config_of_folder(source, data, overrides, given), source.adapter.path, None, _labels(source), given)


def _adapter_of_run(run: RunFolder, name: str) -> Source:
    try:
        return find_source(run.path)
    except UsageError as error:
        if run.adapter.is_dir() or run.checkpoints():
            raise
        raise UsageError(
            f"{name} has no adapter yet: {run} holds neither adapter/ nor a checkpoint; accepted: a run that has saved one, or "
            "--base MODEL for the model without"
        ) from error


def _config_of_folder(source: Source, data: str | None, overrides: Sequence[str], given: frozenset[str]) -> Config:
    """An adapter that lies in no run says how its prompts are written, and what its task is; the rest is given."""
    ours = source.adapter.ours.get("base") or {}
    task = (ours.get("task") if ours else read_peft(source.adapter).task) or "causal-lm"
    known: dict[str, Any] = dict(source.adapter.ours.get(PROMPTS) or {})
    if task == "classification":
        known |= {"format": "classification"}
    return _config({"path": str(source.adapter.path), "task": task}, known, data, overrides, given)


def _of_base(base: str, data: str | None, overrides: Sequence[str], given: frozenset[str]) -> Subject:
    model: dict[str, Any] = {"path": base}
    if "model.storage" not in given:
        model["storage"] = "bf16"  # as load_frozen holds a model of which nothing is said
    is_classified = any(o.replace(" ", "") == "model.task=classification" for o in overrides)
    known = {"format": "classification"} if is_classified else {}
    config = _config(model, known, data, overrides, given)
    labels = None
    if config.model.task == "classification":
        labels = _named_classes(
            model_config(resolve_folder(base, config.model.revision), config.model.trust_remote_code)
        )
        if labels is None:
            raise UsageError(f"--base is {base!r}, whose config.json names no classes (id2label); accepted: an adapter")
    return Subject(config, None, None, labels, given)


def _named_classes(config: Any) -> list[str] | None:
    """The classes that a model's configuration names; None where they have transformers' own names alone."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _config(
    model: Mapping[str, Any],
    known: Mapping[str, Any],
    data: str | None,
    overrides: Sequence[str],
    given: frozenset[str],
) -> Config:
    if "format" not in known and "data.format" not in given:
        raise UsageError(
            f"{model['path']!r} does not say how its samples are written; accepted: beside --data FILE "
            "data.format=alpaca, chat, completion or text"
        )
    sections = {"model": dict(model), "data": {"train": data or "none", **known}, "run": {"output_dir": "none"}}
    return load_config(sections, overrides)


def _labels(source: Source) -> list[str] | None:
    """The classes of an adapter that classifies, in the order of their ids."""
    base = source.adapter.ours.get("base") or {}
    if base.get("id2label"):
        return [str(base["id2label"][str(number)]) for number in range(len(base["id2label"]))]
    file = adapter_labels(source.adapter.path)
    if file.is_file():
        return [str(label) for label in json.loads(file.read_text(encoding="utf-8"))]
    return None


def _quoted(text: str) -> str:
    """A YAML string, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"
