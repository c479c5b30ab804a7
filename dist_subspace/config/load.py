"""YAML and `key=value` overrides become one frozen, typed configuration, or one sentence that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dist_subspace.config.rules import check_rules, normalised
from dist_subspace.config.schema import Config
from dist_subspace.errors import UsageError


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Arguments:
        source: a YAML file, or a mapping.
        overrides: `section.key=value`, the value read as YAML; later ones win.

    Raises:
        UsageError: one sentence that names the field, the value and what is accepted.
    """
    values = _read(source)
    for override in overrides:
        _override(values, override)
    _check_keys(values, Config, "")
    values = normalised(values, Path(source).stem if isinstance(source, (str, Path)) else "run")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    check_rules(config)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def config_schema() -> dict[str, Any]:
    """The JSON schema, for editors."""
    return Config.model_json_schema()


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
    path = Path(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"CONFIG is {str(source)!r}, which cannot be read ({error.strerror}); accepted: a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{source} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source} holds {type(values).__name__}; accepted: sections {', '.join(Config.model_fields)}")
    return {key: {} if value is None else value for key, value in values.items()}


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UsageError(f"override {text!r} has no '='; accepted: key=value, for example training.max_steps=50")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UsageError(f"override {text!r} has a value that is not YAML") from None
    *path, last = key.split(".")
    if not path:
        raise _unknown(key, [f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields])  # type: ignore[union-attr]
    place = values
    for part in path:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[last] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; nobody means that."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _check_keys(values: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    """Unknown keys name the nearest known one, which may lie in another section."""
    for key, value in values.items():
        if key == "warmup_ratio" and prefix == "training.":
            continue
        if key not in model.model_fields:
            raise _unknown(f"{prefix}{key}", [f"{prefix}{name}" for name in model.model_fields])
        inner = model.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, Mapping):
                raise UsageError(f"{prefix}{key} is {value!r}; accepted: a mapping of {', '.join(inner.model_fields)}")
            _check_keys(value, inner, f"{prefix}{key}.")


def _unknown(key: str, known: list[str]) -> UsageError:
    everywhere = known + [f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields]  # type: ignore[union-attr]
    last = key.rpartition(".")[2]
    same_name = [name for name in everywhere if name.rpartition(".")[2] == last]
    near = (
        same_name or difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(key, everywhere, 1, 0.5)
    )
    hint = f"; the nearest known key is {near[0]}" if near else f"; known here: {', '.join(known)}"
    return UsageError(f"{key} is no key of the configuration{hint}")


def _sentence(error: ValidationError) -> str:
    """The first complaint as one sentence."""
    first = error.errors(include_url=False, include_context=True)[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(
        part for part in path if not part[:1].isupper() and part not in ("str", "float", "int", "constrained-float")
    )
    if first["type"] == "missing":
        return f"{field} is missing; it has no default"
    return f"{field} is {first['input']!r}; accepted: {_accepted(first)}"


def _accepted(problem: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "").replace(" or ", ", ")
    bounds = {
        "greater_than": "above",
        "greater_than_equal": "at least",
        "less_than": "below",
        "less_than_equal": "at most",
    }
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"a number {bounds[kind]} {limit}"
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "list": "a list",
        "dict": "a mapping",
    }
    base = kind.partition("_")[0]
    return names.get(base, str(problem["msg"]).lower())
