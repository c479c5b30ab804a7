"""What a field of the configuration takes beside its own type: clocks, short names of types, one text for a list."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dist_subspace.config.fields import Count, DtypeName, NameList, Reporters, Resume, Seconds, Section
from dist_subspace.errors import UsageError


class Example(Section):
    time: Seconds | None = None
    dtype: DtypeName = "bfloat16"
    reporters: Reporters = ()
    resume: Resume = "none"
    names: NameList = ()
    count: Count = 1


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("time", 90, 90.0),
        ("time", "1:02:03", 3723.0),
        ("time", " 0:00:30 ", 30.0),
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "torch.float16", "float16"),
        ("dtype", "torch.fp16", "float16"),
        ("reporters", "none", ()),
        ("reporters", ["none"], ()),
        ("reporters", None, ()),
        ("reporters", "tensorboard", ("tensorboard",)),
        ("reporters", ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ("resume", True, "auto"),
        ("resume", False, "none"),
        ("resume", None, "none"),
        ("resume", "runs/a", "runs/a"),
        ("names", "q_proj", ("q_proj",)),
        ("names", ["q_proj", "k_proj"], ("q_proj", "k_proj")),
    ],
    ids=str,
)
def test_a_value_is_read_as_people_write_it(field: str, given: Any, read: Any) -> None:
    assert getattr(Example.model_validate({field: given}), field) == read


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("time", "90", r"training\.max_time is '90'; accepted: seconds, hh:mm:ss, or null"),
        ("time", "1:60:00", r"training\.max_time is '1:60:00'"),
        ("reporters", "tensorbord", r"run\.report_to .*tensorbord.*tensorboard"),
        ("reporters", ["tensorboard", "none"], r"run\.report_to .*'none'"),
    ],
)
def test_a_word_that_means_nothing_is_refused_in_a_sentence(field: str, given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as raised:
        Example.model_validate({field: given})
    assert isinstance(raised.value.errors()[0]["ctx"]["error"], UsageError)


@pytest.mark.parametrize(
    ("field", "given"),
    [("time", 0), ("time", float("inf")), ("count", 0), ("count", True), ("count", 1.0), ("names", ""), ("unknown", 1)],
    ids=str,
)
def test_a_value_of_another_type_or_beyond_its_bounds_is_an_error(field: str, given: Any) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({field: given})


def test_a_section_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example().count = 2  # type: ignore[misc]
