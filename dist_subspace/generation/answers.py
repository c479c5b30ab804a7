"""Answers to many prompts, shared out over the ranks a batch each, in the order of the prompts."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from dist_subspace.families.configuration import is_encoder_decoder
from dist_subspace.generation.batches import Batch, batches, check_lengths, most_tokens, too_long_of
from dist_subspace.generation.room import longest_row, padded, takes_padding
from dist_subspace.generation.settings import end_ids, greedy
from dist_subspace.placement.collectives import agreed, gather_objects, world
from dist_subspace.placement.evaluation_mode import in_evaluation
from dist_subspace.placement.tensors import is_split

STOP, LENGTH = "stop", "length"
CONTEXT = 8  # tokens of a prompt that the text behind it is written with


@dataclass(frozen=True)
class Answer:
    """What was written: the text without special tokens, its ids with the end, and why it ended (`stop`: by itself; `length`: by
    the most tokens, or the model's positions)."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    skip_special_tokens: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Collective: every rank's model answers its share of the prompts; all answers on every rank, in the prompts' order.

    The same answers on any number of ranks, and whether the model is whole on each or split: batches depend on the prompts
    alone, and each draws from its own seed. The model's mode and torch's random state are as before.

    Arguments:
        prompts: ids of each, the same on every rank (`training.data.prompting`).
        config: of `generation_settings`; unset: greedy.
        batch_size: prompts of one call.
        progress: called with (answers so far, answers in all).

    Raises:
        UsageError: a prompt that is too long for the model; every rank raises.
    """
    made: list[Answer] = []
    for some in answered(model, tokenizer, prompts, config, batch_size, seed, skip_special_tokens=skip_special_tokens):
        made += [answer for (answer,) in some]
        if progress is not None:
            progress(len(made), len(prompts))
    return made


def answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    batch_size: int = 8,
    seed: int = 0,
    *,
    first: int = 0,
    ways: Sequence[Callable[[], AbstractContextManager[Any]]] = (nullcontext,),
    skip_special_tokens: bool = True,
) -> Iterator[list[tuple[Answer, ...]]]:
    """Collective at each step: what `answers` gives, a batch of each rank at a time, in order.

    Arguments:
        first: the prompts before it have their answers already.
        ways: contexts in which each prompt is answered (`partial(disabled, model)`: by the base alone); an answer for each.
    """
    config = config or greedy(model)
    for round_ in rounds(model, [len(prompt) for prompt in prompts], config, batch_size, first):
        own = round_[world().rank] if world().rank < len(round_) else None
        written: list[list[list[int]]] = []
        # Where the weights are split, `generate` is one collective after another, which a rank that has raised leaves.
        with nullcontext() if is_split(model) else agreed("writing answers"):
            for way in ways:
                with way():
                    written.append(_written(model, tokenizer, prompts, config, own, seed))
        gathered = [ids for of_rank in gather_objects(list(zip(*written, strict=True))) for ids in of_rank]
        yield [
            tuple(as_answer(tokenizer, config, prompt, ids, skip_special_tokens) for ids in of_ways)
            for prompt, of_ways in zip(prompts[round_[0].first :], gathered)
        ]


def rounds(
    model: Any, lengths: Sequence[int], config: GenerationConfig, batch_size: int, first: int = 0
) -> list[list[Batch]]:
    """Collective: the batches from prompt `first` on, one for each rank in a round; the last round may
    have fewer.

    Raises:
        UsageError: a prompt that is too long for the model.
    """
    if first >= len(lengths):
        return []
    new_tokens, apart = int(config.max_new_tokens or 0), is_encoder_decoder(model)
    with agreed("measuring the prompts"):
        longest = checked_room(model, lengths, config)
    with in_evaluation(model):
        pads = batch_size == 1 or len(set(lengths)) == 1 or takes_padding(model)
    made = batches(lengths, batch_size, new_tokens, longest, first=first, pads=pads, apart=apart)
    return [made[start : start + world().size] for start in range(0, len(made), world().size)]


def checked_room(model: Any, lengths: Sequence[int], config: GenerationConfig) -> int | None:
    """Local: most tokens of a row of the model, prompt and answer; None for no limit.

    Raises:
        UsageError: one of the prompts leaves no room for an answer.
    """
    longest = _longest(model, lengths, config)
    check_lengths(lengths, longest, apart=is_encoder_decoder(model))
    return longest


def without_room(model: Any, lengths: Sequence[int], config: GenerationConfig) -> tuple[list[int], int | None]:
    """Local: the numbers of the prompts that leave no room for an answer, and the most tokens that a prompt may have."""
    longest, apart = _longest(model, lengths, config), is_encoder_decoder(model)
    return too_long_of(lengths, longest, apart=apart), most_tokens(longest, apart=apart)


def _longest(model: Any, lengths: Sequence[int], config: GenerationConfig) -> int | None:
    return longest_row(model, max(lengths) + int(config.max_new_tokens or 0))


def as_answer(
    tokenizer: Any,
    config: GenerationConfig,
    prompt: Sequence[int],
    ids: Sequence[int],
    skip_special_tokens: bool = True,
) -> Answer:
    """The answer that new ids are behind a prompt, up to their end."""
    ends = end_ids(config)
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = tuple(ids if stop is None else ids[: stop + 1])
    text = text_behind(tokenizer, prompt, kept if stop is None else kept[:-1], skip_special_tokens)
    by_text = any(text.endswith(end) for end in _texts(config.stop_strings))
    return Answer(text, kept, STOP if stop is not None or by_text else LENGTH)


def text_behind(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """What the ids say behind the prompt's: sentencepiece drops the blank before a first word, which here is no first one."""
    before = list(prompt[-CONTEXT:])
    known, whole = (decoded(tokenizer, part, skip_special_tokens) for part in (before, [*before, *ids]))
    return whole[len(known) :] if whole.startswith(known) else decoded(tokenizer, ids, skip_special_tokens)


def decoded(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The ids' text as it stands, without blanks taken out of it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


@contextmanager
def drawing_from(seed: int, number: int) -> Iterator[None]:
    """Within the block random numbers depend on the seed and the number alone; afterwards torch's are as before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(zlib.crc32(f"{seed}:{number}".encode()))
        yield


@torch.no_grad()
def generated(
    model: Any, tokenizer: Any, rows: list[list[int]], config: GenerationConfig, new_tokens: int, **more: Any
) -> list[list[int]]:
    """Collective where the model is split: `generate` of rows of prompts; the new ids of each, with what follows an end.

    transformers fills what the settings leave open from the model's own, which may be others: these are the settings' for now.
    """
    right = is_encoder_decoder(model)
    ids, mask = padded(rows, int(config.pad_token_id or 0), model.device, right=right)
    used, own = copy.deepcopy(config), model.generation_config
    used.max_new_tokens = new_tokens
    more |= {"tokenizer": tokenizer} if used.stop_strings else {}
    model.generation_config = used
    try:
        with in_evaluation(model):
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=used, **more)
    finally:
        model.generation_config = own
    new: list[list[int]] = made[:, 1 if right else ids.shape[1] :].tolist()
    return new


def _written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    batch: Batch | None,
    seed: int,
) -> list[list[int]]:
    """Collective where the model is split: the new ids of this rank's batch, with what follows an end; of one without a batch
    none, and where the weights are split it writes a token for nothing."""
    if batch is None and not is_split(model):
        return []
    if batch is None:
        generated(model, tokenizer, [[0]], greedy(model, max_new_tokens=1), 1)
        return []
    rows = [list(prompt) for prompt in prompts[batch.first : batch.stop]]
    with drawing_from(seed, batch.first):
        return generated(model, tokenizer, rows, config, batch.new_tokens)


def _texts(entry: Any) -> list[str]:
    return [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
