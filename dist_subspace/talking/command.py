"""`dist-subspace generate`, from its options to its exit status, on every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dist_subspace.adapted.opened import Opened, open_adapted
from dist_subspace.adapted.source import find_source
from dist_subspace.errors import UsageError
from dist_subspace.generation.settings import check_entries, generation_settings, read_settings
from dist_subspace.interchange.base_model import shown_name
from dist_subspace.placement.collectives import agreed, is_everyones, world
from dist_subspace.placement.engines import be_quiet
from dist_subspace.placement.process_group import leave_process_group, meet_ranks
from dist_subspace.placement.rendezvous import RefusedElsewhere
from dist_subspace.run_folder.status import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from dist_subspace.stopping import STOP, listening
from dist_subspace.talking.answer_file import check_new
from dist_subspace.talking.chat import Chat
from dist_subspace.talking.files import answer_file
from dist_subspace.talking.options import Asked
from dist_subspace.talking.progress import Progress
from dist_subspace.talking.terminal import Keys, run_chat
from dist_subspace.training.data.prompting import Prompting, check_written
from dist_subspace.training.data.sources import open_source

_WRITE = ("causal-lm", "seq2seq-lm")
_EXIT_KEYS = 130  # as a shell has it, where Ctrl-C has ended an answer


def generate(asked: Asked) -> int:
    """Collective under a launcher: do what is asked; returns the exit status. Rank 0 alone speaks.

    Raises:
        UsageError: on the rank that shall say so.
    """
    be_quiet()
    try:
        meet_ranks()
        return _generate(asked)
    except RefusedElsewhere:
        return EXIT_USAGE
    except UsageError as error:
        if is_everyones(error) and not world().is_main:
            return EXIT_USAGE
        raise
    finally:
        leave_process_group()


def _generate(asked: Asked) -> int:
    with agreed("reading the options"):
        tools = _checked(asked)
    reading = Progress("reading the base model", "MiB", shown=world().is_main)
    opened = open_adapted(
        asked.path,
        base_model=asked.base_model,
        storage=asked.storage,
        preset=asked.preset,
        progress=lambda done, total: reading(done >> 20, total >> 20),
    )
    reading.close()
    try:
        with agreed("preparing to generate"):
            prompting, config = _prepared(asked, opened)
        _say(_where(opened))
        if asked.input is not None:
            return _file(asked, opened, prompting, config)
        return _talk(asked, opened, prompting, config, tools)
    finally:
        opened.close()


def _checked(asked: Asked) -> list[Any] | None:
    """Local: refuse now what needs no model to be refused; the tools."""
    source = find_source(asked.path)
    task = (source.adapter.ours.get("base") or {}).get("task") or "causal-lm"
    if task not in _WRITE:
        raise UsageError(
            f"{asked.path!r} is of model.task {task!r}, which writes no text; accepted: {', '.join(_WRITE)}"
        )
    check_written(source.settings(format=asked.format, template=asked.template))
    check_entries(asked.generation)
    if asked.generation_folder is not None:
        read_settings(asked.generation_folder)
    if asked.input is not None and world().is_main:
        open_source(asked.input, "train", "--input")
        check_new(str(asked.output))
    return None if asked.tools is None else _tools(asked.tools)


def _prepared(asked: Asked, opened: Opened) -> tuple[Prompting, GenerationConfig]:
    if not hasattr(opened.model, "generate") or not opened.model.can_generate():
        raise UsageError(
            f"{shown_name(opened.source.adapter.path)!r} is for {type(opened.model).__name__}, which writes no text; accepted: "
            "an adapter of a language model"
        )
    prompting = Prompting(opened.settings(format=asked.format, template=asked.template), opened.tokenizer)
    config = generation_settings(opened.model, prompting.stops(), asked.generation, asked.generation_folder)
    return prompting, config


def _tools(file: str) -> list[Any]:
    try:
        tools = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--tools is {file!r}, which cannot be read: {error}") from error
    if not isinstance(tools, list):
        raise UsageError(f"--tools is {file!r}, which holds {type(tools).__name__}; accepted: a JSON list of tools")
    return tools


def _file(asked: Asked, opened: Opened, prompting: Prompting, config: GenerationConfig) -> int:
    progress = Progress("answering", "prompts", shown=world().is_main)
    with listening():
        whole = answer_file(asked, opened, prompting, config, progress)
    progress.close()
    if not whole:
        _say(f"interrupted by {STOP.reason or 'a stop of another rank'}; the same command goes on with {asked.output}")
        return EXIT_INTERRUPTED
    _say(f"the answers: {asked.output}")
    return EXIT_OK


def _talk(asked: Asked, opened: Opened, prompting: Prompting, config: GenerationConfig, tools: list[Any] | None) -> int:
    keys = Keys()
    chat = Chat(
        opened,
        prompting,
        config,
        show=_show if world().is_main else lambda piece: None,
        say=_say,
        stopped=lambda: keys.pressed,
        system=asked.system,
        tools=tools,
        compare_base=asked.compare_base,
        seed=asked.seed,
        writes=world().is_main,
    )
    if asked.prompt is not None:
        with keys.listening():
            chat.ask(asked.prompt)
        return _EXIT_KEYS if keys.pressed else EXIT_OK
    if prompting.settings.format != "chat":
        _say(
            f"the adapter was trained on single prompts (data.format {prompting.settings.format}): it is not shown earlier turns"
        )
    _say("/help lists what is understood; Ctrl-D leaves")
    run_chat(chat, keys)
    return EXIT_OK


def _where(opened: Opened) -> str:
    ranks = world().size
    lies = "whole on each rank" if opened.preset in ("none", "zero0", "zero1", "zero2") else "split over the ranks"
    if ranks == 1:
        lies = "in this process"
    adapter, base = shown_name(opened.source.adapter.path), shown_name(opened.base)
    return f"{adapter} on {base}: {lies} (--preset {opened.preset})"


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(sentence: str) -> None:
    """On standard error: standard output has the answers alone."""
    if world().is_main:
        print(sentence, file=sys.stderr, flush=True)
