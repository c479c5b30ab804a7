"""Kinds of values that a YAML file may write in more than one way; each is turned into one typed form."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dist_subspace.config.names import SHORT_DTYPES, Dtype, Reporter
from dist_subspace.errors import UsageError, unknown_name


class Section(BaseModel):
    """A frozen part of the configuration: unknown keys, other types and values that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    clock = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d)", value.strip())
    if clock is None:
        raise UsageError(f"training.max_time is {value!r}; accepted: seconds, hh:mm:ss, or null")
    hours, minutes, seconds = map(int, clock.groups())
    return hours * 3600 + minutes * 60 + seconds


def _short_dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return SHORT_DTYPES.get(name, name)


def _reporters(value: Any) -> Any:
    if value is None or value == "none" or value == ["none"]:
        return ()
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        return listed
    for name in listed:
        if name not in (*get_args(Reporter), "none"):
            raise unknown_name("run.report_to", name, [*get_args(Reporter), "none"])
    if "none" in listed:
        raise UsageError(f"run.report_to is {list(listed)}; 'none' stands alone")
    return tuple(dict.fromkeys(listed))


def _repository(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise UsageError(f"run.push_to_hub is {value!r}; accepted: a name on the Hub (user/name), or null")
    return value


def _resume(value: Any) -> Any:
    # YAML 1.1 reads `no` as false; null is what a person writes for "do not".
    if value is True:
        return "auto"
    return "none" if value is None or value is False else value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
NameList = Annotated[Texts, BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Seconds = Annotated[float, Field(gt=0), BeforeValidator(_seconds, json_schema_input_type=float | str)]
Rate = Annotated[float, Field(gt=0)] | Literal["auto"]
DtypeName = Annotated[Dtype, BeforeValidator(_short_dtype)]
Reporters = Annotated[
    tuple[Reporter, ...],
    Field(strict=False),
    BeforeValidator(_reporters, json_schema_input_type=list[Reporter] | Reporter | Literal["none"] | None),
]
Repository = Annotated[Text, BeforeValidator(_repository, json_schema_input_type=str)]
Resume = Annotated[Text, BeforeValidator(_resume, json_schema_input_type=str | bool | None)]
