"""Options of the command line that contradict one another, and entries of GenerationConfig by name."""

from __future__ import annotations

import pytest

from dist_subspace.errors import UsageError
from dist_subspace.talking.options import Asked, generation_entries


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no prompt is given; accepted: one of --prompt, --chat, --input"),
        ({"prompt": "x", "chat": True}, "--prompt and --chat are given together"),
        ({"input": "x.jsonl"}, "--input is given without --output"),
        ({"prompt": "x", "output": "y"}, "--output is given without --input"),
        ({"prompt": "x", "skip_long": True}, "--skip-long is given without --input"),
    ],
)
def test_one_way_of_asking_is_given(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Asked("run", **given)  # type: ignore[arg-type]


def test_entries_are_yaml_values_each_given_once() -> None:
    made = generation_entries({"top_p": 0.5, "top_k": None}, ["END"], ["no_repeat_ngram_size=3", "do_sample=true"])
    assert made == {"top_p": 0.5, "stop_strings": ["END"], "no_repeat_ngram_size": 3, "do_sample": True}
    for others, said in ((["top_p=1"], "given already"), (["x"], "accepted: NAME=VALUE"), (["x=[1"], "cannot be read")):
        with pytest.raises(UsageError, match=said):
            generation_entries({"top_p": 0.5}, None, others)
