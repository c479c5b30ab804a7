"""A file of prompts, answered over all ranks into a file of answers, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dist_subspace.adapted.opened import Opened
from dist_subspace.checkpoint.fingerprint import file_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import Answer, answered, checked_room
from dist_subspace.interchange.description import WEIGHTS
from dist_subspace.placement.collectives import any_rank, on_main
from dist_subspace.stopping import STOP
from dist_subspace.subspace import disabled
from dist_subspace.talking.answer_file import AnswerFile
from dist_subspace.talking.options import Asked
from dist_subspace.training.data.prompting import Prompt, Prompting
from dist_subspace.training.data.sources import open_source

TEXT, REASON = "generated_text", "finish_reason"
BASE = "base_"
"""Stands before the names of what the base alone wrote."""


@dataclass(frozen=True)
class _Questions:
    """What rank 0 has read: the prompts' ids, which every rank is given, and how many of them have an answer."""

    ids: list[list[int]]
    done: int


def answer_file(
    asked: Asked, opened: Opened, prompting: Prompting, config: GenerationConfig, progress: Callable[[int, int], None]
) -> bool:
    """Collective: write the answers to `asked.input` into `asked.output`; whether they are all there (a stop ends it between two
    batches, and the same call goes on).

    Each line is the record with `generated_text` and `finish_reason`, and those of the base where it is compared.

    Arguments:
        progress: called with (answers so far, answers in all).

    Raises:
        UsageError: an input that cannot be read or holds no prompt, a prompt that is too long, an output that is there already
            or was begun otherwise. StorageError: the disk refuses.
    """
    kept: dict[str, Any] = {}

    def begin() -> _Questions:
        records, prompts, content = read_prompts(str(asked.input), prompting, asked.system)
        checked_room(opened.model, [len(prompt.ids) for prompt in prompts], config)
        kept["file"] = AnswerFile(str(asked.output), _identity(asked, content, opened, prompting, config))
        kept["records"] = records
        return _Questions([prompt.ids for prompt in prompts], kept["file"].done)

    questions = on_main(begin)
    total, done = len(questions.ids), questions.done
    progress(done, total)
    ways = (nullcontext, partial(disabled, opened.model)) if asked.compare_base else (nullcontext,)
    for some in answered(
        opened.model, opened.tokenizer, questions.ids, config, asked.batch_size, asked.seed, first=done, ways=ways
    ):
        on_main(_append, kept, some, done)
        done += len(some)
        progress(done, total)
        if done < total and any_rank(bool(STOP)):
            return False

    def finish() -> None:
        kept["file"].finish()

    on_main(finish)
    return True


def read_prompts(
    path: str, prompting: Prompting, system: str | None = None
) -> tuple[list[dict[str, Any]], list[Prompt], str]:
    """Local: the records of a file or a Hub data set, their prompts, and what tells its content from another one's.

    Each line of a .txt that is not blank is a prompt of its own.

    Raises:
        UsageError: what cannot be read, a file without a prompt, a record that names what is written beside it.
    """
    source = open_source(path, "train", "--input")
    if source.one_document:
        (document,) = source.read()
        lines = [line for line in document["text"].splitlines() if line.strip()]
        records = [prompting.record(line, system=system) for line in lines]
    elif system is not None:
        raise UsageError(
            f"--system is given for {path!r}, whose records have their own; accepted with --input: a .txt file"
        )
    else:
        records = list(source.read())
    if not records:
        raise UsageError(f"--input is {path!r}, which holds no prompt; accepted: at least one")
    for name in (TEXT, REASON):
        if any(name in record for record in records):
            raise UsageError(f"--input is {path!r}, which has a column {name!r} already; accepted: records without it")
    return records, prompting.of_records(records, source.name), source.content


def _append(kept: Mapping[str, Any], some: list[tuple[Answer, ...]], done: int) -> None:
    records = kept["records"][done : done + len(some)]
    kept["file"].append(record | dict(_columns(made)) for record, made in zip(records, some, strict=True))


def _columns(made: tuple[Answer, ...]) -> Iterator[tuple[str, str]]:
    for before, answer in zip(("", BASE), made):
        yield f"{before}{TEXT}", answer.text
        yield f"{before}{REASON}", answer.finish_reason


def _identity(
    asked: Asked, content: str, opened: Opened, prompting: Prompting, config: GenerationConfig
) -> dict[str, Any]:
    """Everything that the answers depend on, but for the number of ranks and where the weights lie, on which they do not."""
    settings = config.to_diff_dict()
    return {
        "input": content,
        "adapter": file_fingerprint(Path(opened.source.adapter.path) / WEIGHTS),
        "storage": asked.storage,
        "prompts": prompting.settings.prompts(),
        "system": asked.system,
        "batch_size": asked.batch_size,
        "seed": asked.seed,
        "compare_base": asked.compare_base,
        **{f"generation.{name}": value for name, value in settings.items() if name != "transformers_version"},
    }
