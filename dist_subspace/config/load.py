"""From a YAML file (or a mapping) and `key=value` overrides to a `Config`, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_subspace.config.messages import first_problem
from dist_subspace.config.schema import Config
from dist_subspace.config.yaml_text import parse, text_of
from dist_subspace.errors import UsageError

# An override of the one takes the other, which the file gave, away: "a recipe, but for 20 steps".
_EITHER = {
    "training.max_steps": "num_train_epochs",
    "training.num_train_epochs": "max_steps",
    "training.warmup_ratio": "warmup_steps",
    "training.warmup_steps": "warmup_ratio",
}
# A node may have these elsewhere than another: copies on a disk of its own.
_PLACES = frozenset(
    {
        "model.path",
        "model.tokenizer",
        "subspace.init_from",
        "data.train",
        "data.eval",
        "data.cache_dir",
        "deepspeed.config",
        "deepspeed.nvme_path",
        "checkpoint.resume",
        "run.output_dir",
    }
)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file or a mapping, with overrides such as `training.max_steps=50` (a YAML value).

    Later overrides win. An unset `run.output_dir` becomes `runs/<the file's stem>`. Nothing of the model, the method or the
    data is looked at.

    Raises:
        UsageError: one sentence that names the field (dotted), its value and what is accepted.
    """
    stem = "run" if isinstance(source, Mapping) else Path(source).stem
    tree = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read(Path(source))
    _fill_sections(tree)
    for override in overrides:
        _override(tree, override)
    run = tree["run"]
    if isinstance(run, dict) and run.get("output_dir") is None:
        run["output_dir"] = f"runs/{stem}"
    return _validated(tree)


def dump_config(config: Config) -> str:
    """YAML with every key, which `load_config` reads back to an equal object."""
    return text_of(config.model_dump(mode="json"))


def settings_of_all(config: Config) -> dict[str, Any]:
    """What must be the same on every rank of a run: every key, dotted, but those that say where something lies."""
    tree = config.model_dump(mode="json")
    settings = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    return {key: value for key, value in settings.items() if key not in _PLACES}


def config_schema() -> dict[str, Any]:
    """The JSON schema, for editors: types, ranges, names, defaults and a description of each key."""
    # Not above: it takes seconds, and reading a configuration needs none of it.
    from dist_subspace.storage import storages

    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema = dialect | Config.model_json_schema(mode="validation")
    schema["$defs"]["ModelSection"]["properties"]["storage"]["enum"] = list(storages())
    return schema


def fill_unset(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy where keys (dotted) that the user left open take these values; keys that were given stay, and the others stay
    open."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        if key not in getattr(config, section).model_fields_set:
            tree.setdefault(section, {})[key] = value
    return _validated(tree)


def _validated(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise first_problem(error, Config) from None


def _read(path: Path) -> dict[str, Any]:
    name = f"the configuration {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}); accepted: a YAML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text; accepted: a YAML file") from error
    tree = parse(text, name)
    if not isinstance(tree, dict):
        state = "empty" if tree is None else "no mapping"
        raise UsageError(f"{name} is {state}; accepted: sections {', '.join(Config.model_fields)}")
    return tree


def _fill_sections(tree: dict[str, Any]) -> None:
    """A section that is absent or empty is a mapping without keys, so that an error names the key that it needs."""
    for name in Config.model_fields:
        if tree.get(name) is None:
            tree[name] = {}


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(
            f"override {override!r} is not understood; accepted: section.key=value, such as training.max_steps=50"
        )
    node = tree
    for depth, part in enumerate(sections, start=1):
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            where = ".".join(parts[:depth])
            raise UsageError(f"override {override!r} goes into {where}, which is {node[part]!r} and no mapping")
        node = node[part]
    node[last] = parse(text, f"override {override!r}")
    other = _EITHER.get(".".join(parts))
    if other is not None and node[last] is not None:
        node.pop(other, None)
