"""Virtual tokens that are embeddings `(n, d)` of a stack's input: what prompt-tuning and P-tuning have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from dist_subspace.options import Option
from dist_subspace.subspace.core.targets import Choice
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.insertion import (
    AFTER_FIRST,
    FRONT,
    EncoderInsertion,
    Insertion,
    default_placement,
)
from dist_subspace.subspace.virtual_tokens.part import TokenWords, VirtualTokens

PLACEMENT: Mapping[str, Option] = {
    "placement": Option(
        None,
        "front, or after-first; null: after the first token where an encoder's head reads that, else front",
        lambda value: value in (None, FRONT, AFTER_FIRST),
        f"{FRONT}, {AFTER_FIRST} or null",
    )
}


class InputTokens(VirtualTokens):
    attribute = "prompt_tokens"

    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        stacks.input_width(choice.model)  # refuses a model before anything is done to it
        return super().sites(choice)

    def measure(self, model: nn.Module) -> int:
        self.placement = self.settings.options["placement"] or default_placement(model)
        return stacks.input_width(model)

    def connect(self, model: nn.Module) -> None:
        first, *others = stacks.stacks(model)
        if others:
            EncoderInsertion(self, model, self.placement)
        else:
            Insertion(self, model, first, self.placement)


Placed = TypeVar("Placed", bound=InputTokens)


class InputTokenWords(TokenWords[Placed]):
    def agrees(self, part: Placed) -> bool:
        """PEFT puts them in front, always."""
        return super().agrees(part) and part.placement == FRONT
