"""How a model writes, as transformers' GenerationConfig says it: the model's own defaults, what is given, and where it stops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dist_subspace.errors import UsageError, unknown_name

NEW_TOKENS = 512
"""The most tokens of an answer, where neither the model's folder nor anybody else says a number."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Entries that mean nothing unless the next token is drawn."""
_OURS = {
    "max_length": "it counts the prompt too, which differs; accepted: max_new_tokens",
    "min_length": "it counts the prompt too, which differs; accepted: min_new_tokens",
    "num_return_sequences": "a prompt has one answer; accepted: another seed for another answer",
    "return_dict_in_generate": "the answers are texts; accepted: the model's own generate",
    "prompt_lookup_num_tokens": "one row at a time alone can be assisted; accepted: the model's own generate",
    "cache_implementation": "only a cache that grows is known to suit every method; accepted: the model's own generate",
}
_Range = tuple[Callable[[Any], bool], str]
_RANGES: dict[str, _Range] = {
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0, which is greedy"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0, of at most 1"),
    "min_p": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "top_k": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0, which is all"),
    "max_new_tokens": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "num_beams": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "repetition_penalty": (lambda v: _number(v) and v > 0, "a number above 0"),
}


def generation_settings(
    model: Any,
    stops: Iterable[int] = (),
    given: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> GenerationConfig:
    """The settings that `generate` is called with. Drawing is chosen by a temperature, top_p or the like above greedy.

    Arguments:
        stops: ids at which an answer ends, beside those of the model.
        given: entries of GenerationConfig, which win; None as a value says nothing.
        folder: of a `generation_config.json` in the place of the model's own.

    Raises:
        UsageError: an entry that is unknown or cannot hold for many prompts, or a value out of its range.
    """
    config = copy.deepcopy(model.generation_config) if folder is None else read_settings(folder)
    wanted = check_entries(given or {})
    wanted = {name: value for name, value in wanted.items() if (name, value) != ("temperature", 0)} | _drawn(wanted)
    _taken(lambda: config.update(**wanted))
    if config.do_sample is not True:
        for name in SAMPLING:
            setattr(config, name, None)
    if "eos_token_id" not in wanted:
        config.eos_token_id = list(dict.fromkeys([*_ids(config.eos_token_id), *stops])) or None
    # What stands behind an end is never read; the id must have a row in the model's table.
    config.pad_token_id = next(iter(_ids(config.eos_token_id)), 0)
    config.max_new_tokens = config.max_new_tokens or NEW_TOKENS
    config.max_length, config.num_return_sequences = None, 1
    _taken(config.validate)
    return config


def greedy(model: Any, stops: Iterable[int] = (), max_new_tokens: int = NEW_TOKENS) -> GenerationConfig:
    """The most likely next token each time, one beam: the same text whenever and wherever it is written."""
    given = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    return generation_settings(model, stops, given)


def end_ids(config: GenerationConfig) -> frozenset[int]:
    """Ids at which an answer ends."""
    return frozenset(_ids(config.eos_token_id))


def read_settings(folder: str | Path) -> GenerationConfig:
    """The settings in a folder. Raises UsageError."""
    if not (Path(folder) / "generation_config.json").is_file():
        raise UsageError(f"generation_config is {str(folder)!r}; accepted: a folder with generation_config.json")
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"generation_config is {str(folder)!r}, which is not understood: {_first_line(error)}"
        ) from error


def _taken(change: Callable[[], object]) -> None:
    try:
        change()
    except (ValueError, TypeError) as error:
        raise UsageError(f"transformers refuses the generation settings: {_first_line(error)}") from error


def check_entries(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, without Nones; no model is needed to tell that it can hold.

    Raises:
        UsageError: as `generation_settings`.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    known = GenerationConfig().to_dict()
    for name, value in wanted.items():
        if name in _OURS:
            raise UsageError(f"{name} is {value!r}: {_OURS[name]}")
        if name not in known or name.startswith("_"):
            raise unknown_name("a generation setting", name, [n for n in known if n[0] != "_" and n not in _OURS])
        fits, accepted = _RANGES.get(name, (lambda _: True, ""))
        if not fits(value):
            raise UsageError(f"{name} is {value!r}; accepted: {accepted}")
    _drawn(wanted)
    return wanted


def _drawn(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the next token is drawn, where what is given says so. Raises UsageError where it says both."""
    drawing = [name for name in SAMPLING if name in wanted and not (name == "temperature" and wanted[name] == 0)]
    if wanted.get("temperature") == 0:
        drawing = []
    if "do_sample" not in wanted:
        return {"do_sample": True} if drawing else {"do_sample": False} if "temperature" in wanted else {}
    if wanted["do_sample"] is False and drawing:
        raise UsageError(
            f"do_sample is False and {drawing[0]} is {wanted[drawing[0]]!r}, which says how to draw; accepted: one of them"
        )
    if wanted["do_sample"] and wanted.get("temperature") == 0:
        raise UsageError("do_sample is True and temperature is 0, which is greedy; accepted: one of them")
    return {}


def _ids(entry: Any) -> list[int]:
    return [] if entry is None else [int(i) for i in (entry if isinstance(entry, list | tuple) else [entry])]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
