"""From pydantic's list of errors to the one sentence that a person needs: field, value, what is accepted."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dist_subspace.errors import UsageError, unknown_name

_BOUNDS = ((annotated_types.Ge, "ge", "of at least {}"), (annotated_types.Gt, "gt", "above {}"))
_LIMITS = ((annotated_types.Le, "le", "at most {}"), (annotated_types.Lt, "lt", "below {}"))
_PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def first_problem(error: ValidationError, top: type[BaseModel]) -> UsageError:
    """The sentence for the first field that is wrong; of a field that may be several things, for what came nearest."""
    problems = error.errors()
    first = _place(top, problems[0]["loc"])[0]
    problem = max((p for p in problems if _place(top, p["loc"])[0][: len(first)] == first), key=lambda p: len(p["loc"]))
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return cause
    path, field, model = _place(top, problem["loc"])
    name, value = _dotted(path), problem["input"]
    if problem["type"] == "invalid_key":
        return UsageError(
            f"{_dotted(path[: len(problem['loc']) - 1])} has the key {value!r}; accepted: keys that are text"
        )
    if problem["type"] == "extra_forbidden" and model is not None:
        return _unknown_key(top, model, path, str(problem["loc"][-1]))
    if problem["type"] == "missing":
        return UsageError(f"{name} is missing; accepted: {_accepted(field)}")
    if problem["type"] == "literal_error" and field is not None and isinstance(value, str):
        return unknown_name(name, value, map(str, _literals_in(field.annotation)))
    return UsageError(f"{name} is {value!r}; accepted: {_accepted(field)}")


Path = tuple[str | int, ...]


def _place(
    top: type[BaseModel], location: tuple[str | int, ...]
) -> tuple[Path, FieldInfo | None, type[BaseModel] | None]:
    """Where an error lies: its keys and positions, its field, and the section that it is in or is.

    pydantic's location also names the members of unions, which are left out.
    """
    path: list[str | int] = []
    field: FieldInfo | None = None
    model: type[BaseModel] | None = top
    for part in location:
        if model is not None and part in model.model_fields:
            path.append(part)
            field = model.model_fields[str(part)]
            model = next(_models(field.annotation), None)
        elif isinstance(part, int) and field is not None:
            path.append(part)
        elif field is not None and get_origin(field.annotation) is dict and part != "[key]":
            path.append(part)
            field = FieldInfo.from_annotation(get_args(field.annotation)[1])
    return tuple(path), field, model


def _dotted(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the configuration"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _unknown_key(top: type[BaseModel], section: type[BaseModel], path: Path, key: str) -> UsageError:
    """Names the nearest key: of the same section, else the same name in another one, else the nearest dotted one."""
    given = _dotted((*path, key))
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
    if near:
        nearest = _dotted((*path, near[0]))
    else:
        every = list(dotted_keys(top))
        same = [name for name in every if name.rpartition(".")[2] == key.rpartition(".")[2]]
        nearest = (same or difflib.get_close_matches(given, every, n=1, cutoff=0.0))[0]
    return UsageError(f"{given} is no key of the configuration; the nearest is {nearest}")


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from dotted_keys(field.annotation, f"{prefix}{name}.")


def _literals_in(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for argument in get_args(annotation):
            yield from _literals_in(argument)


def _accepted(field: FieldInfo | None) -> str:
    is_section = field is None or (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    return (
        "a mapping of keys to values"
        if is_section or field is None
        else describe(field.annotation, tuple(field.metadata))
    )


def describe(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """What an annotation takes, in words: "a whole number of at least 1, or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        parts = [describe(argument, metadata) for argument in arguments]
        return ", or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 2 else ", or ".join(parts)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return "a mapping" if arguments[1] is Any else f"a mapping from names to {describe(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    words = _PLAIN.get(annotation, "text")
    return words + _range(metadata) if annotation in (int, float) else words


def _range(metadata: tuple[Any, ...]) -> str:
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]

    def words(kinds: Any) -> list[str]:
        return [
            text.format(getattr(item, name)) for item in flat for kind, name, text in kinds if isinstance(item, kind)
        ]

    bounds = words(_BOUNDS) + words(_LIMITS)
    return f" {' and '.join(bounds)}" if bounds else ""
