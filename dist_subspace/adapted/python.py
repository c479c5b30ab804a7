"""In a script or a notebook: `train`, `load` and `generate`, in one process and without a launcher; under one, on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from dist_subspace.adapted.opened import Opened, open_adapted
from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import answers
from dist_subspace.generation.settings import generation_settings
from dist_subspace.placement.process_group import meet_ranks
from dist_subspace.run_folder.status import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, read_status
from dist_subspace.training.data.prompting import Prompting
from dist_subspace.training.data.settings import DataSettings

_OPENED: WeakKeyDictionary[Any, Opened] = WeakKeyDictionary()


def load(
    path: str | Path, *, base_model: str | Path | None = None, storage: str | None = None, preset: str | None = None
) -> tuple[Any, Any]:
    """The model and the tokenizer of a run: `model, tokenizer = load("runs/mine")`.

    The model is the transformers model of the base, held as it was in training, with the adapter on it, in evaluation mode. Under
    a launcher it is collective, and the model is split over the ranks where it was in training.

    Arguments:
        path: a run, a checkpoint or an adapter's folder, ours or PEFT's.
        base_model: a folder or hub name; unset: the base that the adapter names.
        storage: of the frozen weights; unset: that of the training.
        preset: one of `deepspeed.preset`; unset: the training's split and offloading.

    Raises:
        UsageError: no adapter there, or no base that is its own.
    """
    meet_ranks()
    opened = open_adapted(path, base_model=base_model, storage=storage, preset=preset)
    # The model is the key, and must not be held by its own entry.
    _OPENED[opened.model] = replace(opened, model=None)
    return opened.model, opened.tokenizer


def train(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Run a configuration in this process, as `dist-subspace train` does; returns the folder of the run, for `load`.

    A run that was stopped goes on where it was when it is called again. Under a launcher every rank calls it.

    Arguments:
        config: the path of a YAML file, or the sections as a mapping.
        overrides: changes to it, such as "training.max_steps=50".

    Raises:
        UsageError: the run is refused. RuntimeError: it failed, or was interrupted; the message is that of RUN/status.json.
    """
    from dist_subspace.training.run import train as run  # the loop, which whoever loads alone does not need

    folder = Path(load_config(config, overrides).run.output_dir)
    status = run(config if isinstance(config, str | Path) else dict(config), overrides)
    if status == EXIT_OK:
        return folder
    message = (read_status(folder) or {}).get("message") or f"{folder} ended with status {status}"
    if status == EXIT_USAGE:
        raise UsageError(message)
    again = "; the same call goes on" if status == EXIT_INTERRUPTED else ""
    raise RuntimeError(f"{message}{again}")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    *,
    format: str | None = None,
    template: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **settings: Any,
) -> list[str]:
    """Answers to prompts, in their order, each asked as in training. Collective under a launcher: every rank gives the same
    prompts, and gets all answers.

    Arguments:
        prompts: texts (an instruction, a user's turn, or the text itself), records with the training's columns, or
            conversations (lists of messages); a single text is a list of one.
        format, template: as `data.format` and `data.template`; unset: those of the run that `load` read.
        batch_size: prompts of one call.
        settings: entries of transformers' GenerationConfig (`max_new_tokens`, `temperature`, ...); unset: the model's own.

    Raises:
        UsageError: nobody says the format, a record without its columns, a prompt that is too long for the model.
    """
    prompting = Prompting(_settings(model, format, template), tokenizer)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = prompting.of_records([_record(prompting, one) for one in given], source="the prompts")
    config = generation_settings(model, prompting.stops(), settings)
    made = answers(model, tokenizer, [one.ids for one in asked], config, batch_size=batch_size, seed=seed)
    return [answer.text for answer in made]


def _settings(model: Any, format: str | None, template: str | None) -> DataSettings:
    opened = _OPENED.get(model)
    if opened is not None:
        return opened.settings(format=format, template=template)
    if format is None:
        raise UsageError(
            "format is not given, and the model is none of dist_subspace.load, which knows it; accepted: alpaca, chat, "
            "completion, text"
        )
    return DataSettings.of_prompts({"format": format} | ({"template": template} if template is not None else {}))


def _record(prompting: Prompting, one: Any) -> dict[str, Any]:
    if isinstance(one, str):
        return prompting.record(one)
    if isinstance(one, Mapping):
        return dict(one)
    if prompting.settings.format != "chat":
        raise UsageError(
            f"a prompt is {type(one).__name__}, and the format {prompting.settings.format!r}; accepted: text, or a record"
        )
    return {prompting.settings.column("messages"): [dict(message) for message in one]}
