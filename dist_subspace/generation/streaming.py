"""One text, shown as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from dist_subspace.families.configuration import is_encoder_decoder
from dist_subspace.generation.answers import CONTEXT, Answer, as_answer, checked_room, decoded, drawing_from, generated
from dist_subspace.generation.batches import batches
from dist_subspace.generation.settings import end_ids

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows of a character whose last bytes are still to come


def streamed(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    config: GenerationConfig,
    show: Callable[[str], object],
    *,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    skip_special_tokens: bool = True,
) -> Answer:
    """Collective where the model is split: the answer to one prompt, `show`n piece by piece; with beams at its end.

    Arguments:
        stopped: asked before each token; the answer ends where it says so.

    Raises:
        UsageError: the prompt is too long for the model.
    """
    longest = checked_room(model, [len(prompt)], config)
    (batch,) = batches([len(prompt)], 1, int(config.max_new_tokens or 0), longest, apart=is_encoder_decoder(model))
    beams = (config.num_beams or 1) > 1
    pieces = Pieces(tokenizer, prompt, end_ids(config), show, skip_special_tokens)
    more: dict[str, Any] = {} if beams else {"streamer": pieces}
    with drawing_from(seed, 0):
        (ids,) = generated(
            model,
            tokenizer,
            [list(prompt)],
            config,
            batch.new_tokens,
            stopping_criteria=StoppingCriteriaList([_Told(stopped)]),
            **more,
        )
    answer = as_answer(tokenizer, config, prompt, ids, skip_special_tokens)
    if beams:
        show(answer.text)
    return answer


class Pieces(TextStreamer):
    """Text as its tokens come: a piece is shown when it ends with a whole character.

    A tokenizer may write a token otherwise behind another one, so pieces are what the last tokens' text grows by, and not what
    the new token is alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        ends: frozenset[int],
        show: Callable[[str], object],
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(tokenizer)
        self.ends, self.show, self.skip = ends, show, skip_special_tokens
        self.ids = list(prompt[-CONTEXT:])
        self.before, self.shown = 0, len(self.ids)  # tokens from which the text is made, and those that are shown
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then a token at a time."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.ends]
        self._show(held=True)

    def end(self) -> None:
        self._show(held=False)

    def _show(self, held: bool) -> None:
        known, text = self._text(self.before, self.shown), self._text(self.before, len(self.ids))
        if len(text) <= len(known) or (held and text.endswith(_HALF)):
            return
        self.show(text[len(known) :])
        self.before, self.shown = self.shown, len(self.ids)

    def _text(self, start: int, stop: int) -> str:
        return decoded(self.tokenizer, self.ids[start:stop], self.skip)


class _Told(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)
