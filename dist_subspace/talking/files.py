"""A file of prompts, answered over all ranks into a file of answers, in the order of the prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dist_subspace.adapted.opened import Opened
from dist_subspace.checkpoint.fingerprint import file_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import Answer, answered, checked_room, without_room
from dist_subspace.interchange.description import WEIGHTS
from dist_subspace.notices import say
from dist_subspace.placement.collectives import any_rank, on_main
from dist_subspace.stopping import STOP
from dist_subspace.subspace import disabled
from dist_subspace.talking.answer_file import AnswerFile
from dist_subspace.talking.options import Asked
from dist_subspace.training.data.prompting import Prompt, Prompting
from dist_subspace.training.data.sources import open_source

TEXT, REASON = "generated_text", "finish_reason"
TOO_LONG = "prompt_too_long"
BASE = "base_"
"""Stands before the names of what the base alone wrote."""
_NAMED = 10  # numbers of prompts in a sentence


@dataclass(frozen=True)
class _Questions:
    """What rank 0 has read: the ids of the prompts that are answered, which every rank is given, and how many of them have an
    answer."""

    ids: list[list[int]]
    done: int


@dataclass(frozen=True)
class _Lines:
    """The file of answers, a line a record, in order. places: the numbers of the records that are answered; ways: answers of
    each."""

    file: AnswerFile
    records: list[dict[str, Any]]
    places: list[int]
    ways: int

    @property
    def answers(self) -> int:
        """How many there are."""
        return bisect_left(self.places, self.file.done)

    def append(self, some: list[tuple[Answer, ...]]) -> None:
        """The next answers, and before each the records that get none. Raises StorageError."""
        begun = self.answers
        answered = dict(zip(self.places[begun : begun + len(some)], some, strict=True))
        self._write(max(answered, default=-1) + 1, answered)

    def finish(self) -> None:
        """The records behind the last answer, and the file its name. Raises StorageError."""
        self._write(len(self.records), {})
        self.file.finish()

    def _write(self, stop: int, answered: Mapping[int, Sequence[Answer | None]]) -> None:
        nothing = (None,) * self.ways
        numbers = range(self.file.done, stop)
        self.file.append(self.records[n] | dict(_columns(answered.get(n, nothing))) for n in numbers)


def answer_file(
    asked: Asked, opened: Opened, prompting: Prompting, config: GenerationConfig, progress: Callable[[int, int], None]
) -> bool:
    """Collective: write the answers to `asked.input` into `asked.output`; whether they are all there (a stop ends it between two
    batches, and the same call goes on).

    Each line is the record with `generated_text` and `finish_reason`, and those of the base where it is compared; of a
    prompt that is too long and skipped they are null and `prompt_too_long`.

    Arguments:
        progress: called with (answers so far, answers in all).

    Raises:
        UsageError: an input that cannot be read or holds no prompt, a prompt that is too long, an output that is there already
            or was begun otherwise. StorageError: the disk refuses.
    """
    kept: list[_Lines] = []  # on rank 0 alone

    def begin() -> _Questions:
        records, prompts, content = read_prompts(str(asked.input), prompting, asked.system)
        places = _answerable(asked, opened, [len(prompt.ids) for prompt in prompts], config)
        file = AnswerFile(str(asked.output), _identity(asked, content, opened, prompting, config))
        kept.append(_Lines(file, records, places, ways=len(ways)))
        return _Questions([prompts[place].ids for place in places], kept[0].answers)

    ways = (nullcontext, partial(disabled, opened.model)) if asked.compare_base else (nullcontext,)
    questions = on_main(begin)
    total, done = len(questions.ids), questions.done
    progress(done, total)
    for some in answered(
        opened.model, opened.tokenizer, questions.ids, config, asked.batch_size, asked.seed, first=done, ways=ways
    ):
        on_main(_append, kept, some)
        done += len(some)
        progress(done, total)
        if done < total and any_rank(bool(STOP)):
            return False

    def finish() -> None:
        kept[0].finish()

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


def _append(kept: list[_Lines], some: list[tuple[Answer, ...]]) -> None:
    kept[0].append(some)


def _answerable(asked: Asked, opened: Opened, lengths: list[int], config: GenerationConfig) -> list[int]:
    """Local: the numbers of the prompts that are answered; what is skipped is said.

    Raises:
        UsageError: prompts that are too long, and not to be skipped, or none that is not.
    """
    too_long, most = without_room(opened.model, lengths, config) if asked.skip_long else ([], None)
    if not too_long or len(too_long) == len(lengths):
        checked_room(opened.model, lengths, config)
        return list(range(len(lengths)))
    shown = ", ".join(str(number + 1) for number in too_long[:_NAMED])
    more = f" and {len(too_long) - _NAMED:,} more" if len(too_long) > _NAMED else ""
    say(
        f"{len(too_long):,} of {len(lengths):,} prompts have more than the {most:,} tokens that leave room for an answer, and "
        f"get none: {shown}{more}"
    )
    skipped = set(too_long)
    return [number for number in range(len(lengths)) if number not in skipped]


def _columns(made: Sequence[Answer | None]) -> Iterator[tuple[str, str | None]]:
    for before, answer in zip(("", BASE), made):
        yield f"{before}{TEXT}", None if answer is None else answer.text
        yield f"{before}{REASON}", TOO_LONG if answer is None else answer.finish_reason


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
        **({"skip_long": True} if asked.skip_long else {}),
        **{f"generation.{name}": value for name, value in settings.items() if name != "transformers_version"},
    }
