"""Text to token ids, with the marks at begin and end placed by us and not by the tokenizer's flags."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from dist_subspace.training.data.masked import MaskedEncoder
from dist_subspace.training.data.patterns import PatternEncoder
from dist_subspace.training.data.recipes import Recipes
from dist_subspace.training.data.template import ChatTemplate


class Encoder:
    """A tokenizer whose special marks (begin, [CLS], [SEP], end of sequence) are known apart from the text's own ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The texts' own ids, without marks."""
        return self._encode(texts, False) if texts else []

    @property
    def opening(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return self._marks[0]

    @property
    def closing(self) -> list[int]:
        """What the tokenizer puts after a text."""
        return self._marks[1]

    @property
    def end(self) -> list[int]:
        """The end of sequence as a list: empty for a tokenizer that has none."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def begun(self, ids: list[int]) -> list[int]:
        """A text's ids with what the tokenizer puts before a text, once: a rendered text may begin with it."""
        return ids if self.opening and ids[: len(self.opening)] == self.opening else self.opening + ids

    def ended(self, ids: list[int]) -> list[int]:
        """The ids with the end of sequence, once."""
        return ids if self.end and ids[-1:] == self.end else ids + self.end

    def starting(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that begin a sequence and do not end it (a prompt, as `generate` is given it)."""
        return [self.begun(ids) for ids in self.ids(texts)]

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(int(i) for i in self.tokenizer.all_special_ids)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def recipes(self) -> Recipes:
        return Recipes(self.chat_template)

    @cached_property
    def masked(self) -> MaskedEncoder:
        return MaskedEncoder(self.tokenizer)

    @cached_property
    def patterns(self) -> PatternEncoder:
        return PatternEncoder(self.masked)

    def pairs(self, prompts: list[str], answers: list[str]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids with the end of sequence) for each prompt and its answer.

        Prompt and answer are tokenised together, so that sentencepiece puts no blank before the answer. Where the
        border falls inside a token, they are tokenised apart: the prompt must have the ids it has in `generate`.
        """
        heads = self.ids(prompts)
        wholes = self.ids([prompt + answer for prompt, answer in zip(prompts, answers)])
        joint = [whole[: len(head)] == head for head, whole in zip(heads, wholes)]
        apart = iter(self.ids([answer for answer, is_joint in zip(answers, joint) if not is_joint]))
        tails = [whole[len(head) :] if is_joint else next(apart) for head, whole, is_joint in zip(heads, wholes, joint)]
        return [(self.begun(head), self.ended(tail)) for head, tail in zip(heads, tails)]

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        bare, marked = self._encode(["a"], False)[0], self._encode(["a"], True)[0]
        for start in range(len(marked) - len(bare) + 1):
            if marked[start : start + len(bare)] == bare:
                return marked[:start], marked[start + len(bare) :]
        return [], []

    def _encode(self, texts: list[str], with_marks: bool) -> list[list[int]]:
        # verbose=False: a text longer than the model's context is cut by us, and needs no warning.
        encoded = self.tokenizer(texts, add_special_tokens=with_marks, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]
