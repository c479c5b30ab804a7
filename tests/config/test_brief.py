"""A configuration in a few lines says what somebody gave, and nothing that is a default."""

from __future__ import annotations

import yaml

from dist_subspace.config import load_config
from dist_subspace.config.brief import brief_lines


def test_the_lines_are_the_keys_that_are_no_defaults_one_line_a_section() -> None:
    given = {
        "model": {"path": "a/b", "storage": "nf4"},  # which is the default
        "subspace": {"method": "ssb", "options": {"a": [1, 2]}},
        "data": {"train": "über.jsonl"},
        "training": {"learning_rate": "auto", "warmup_steps": 0.1},
    }
    lines = brief_lines(load_config(given, ["run.output_dir=x", "training.max_steps=5"]))
    read = {}
    for line in lines:
        read |= yaml.safe_load(line)
    assert read == {
        "model": {"path": "a/b"},
        "subspace": {"method": "ssb", "options": {"a": [1, 2]}},
        "data": {"train": "über.jsonl"},
        "training": {"max_steps": 5, "warmup_steps": 0.1},
        "run": {"output_dir": "x"},
    }
    assert len(lines) == 5
