"""Which prompts are answered together. The batches depend on the prompts alone and never on the ranks, so that the same prompts
get the same answers on any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_subspace.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """Prompts `first` to `stop`, and the most tokens that each of their answers may have."""

    first: int
    stop: int
    new_tokens: int


def batches(
    lengths: Sequence[int],
    batch_size: int,
    new_tokens: int,
    longest: int | None,
    *,
    first: int = 0,
    pads: bool = True,
    apart: bool = False,
) -> list[Batch]:
    """Neighbours that are answered together, in order.

    A prompt with less room behind it than `new_tokens` is answered with those of its own length alone: rows of a batch have one
    limit, and the others shall not be cut by it.

    Arguments:
        lengths: tokens of each prompt.
        longest: most tokens of a row of the model, prompt and answer, which each prompt leaves room in (`check_lengths`); None
            for no limit.
        first: the batches begin here.
        pads: whether rows of different lengths may stand in one batch.
        apart: prompt and answer are rows of their own (an encoder-decoder).
    """
    made: list[Batch] = []
    for number, length in enumerate(lengths[first:], start=first):
        room = new_tokens if longest is None else min(new_tokens, longest if apart else longest - length)
        last = made[-1] if made else None
        alike = last is not None and (pads or length == lengths[last.first])
        if last is not None and alike and room == last.new_tokens and number - last.first < batch_size:
            made[-1] = Batch(last.first, number + 1, room)
        else:
            made.append(Batch(number, number + 1, room))
    return made


def most_tokens(longest: int | None, *, apart: bool = False) -> int | None:
    """Most tokens of a prompt that leaves room for an answer; None for no limit."""
    return None if longest is None else longest - (0 if apart else 1)


def too_long_of(lengths: Sequence[int], longest: int | None, *, apart: bool = False) -> list[int]:
    """The numbers of the prompts that leave no room for an answer."""
    most = most_tokens(longest, apart=apart)
    return [number for number, length in enumerate(lengths) if most is not None and length > most]


def check_lengths(lengths: Sequence[int], longest: int | None, *, apart: bool = False) -> None:
    """Raises UsageError for prompts that leave no room for an answer; names the first and says how many there are."""
    most, too_long = most_tokens(longest, apart=apart), too_long_of(lengths, longest, apart=apart)
    if too_long:
        more = len(too_long) - 1
        others = f", and {more:,} {'other is' if more == 1 else 'others are'} too long" if more else ""
        raise UsageError(
            f"prompt {too_long[0] + 1} has {lengths[too_long[0]]:,} tokens{others}; accepted: at most {most:,}, which leave room "
            f"for an answer in the {longest:,} positions of the model"
        )
