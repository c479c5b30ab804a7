"""Conversations: the tokenizer's own chat template, and every assistant turn a target.

Which tokens are the assistant's is asked from the template where it can say so (`{% generation %}`). Otherwise the
conversation is rendered up to before and up to after each assistant turn, and the turn is what came in between. A
template that renders earlier turns differently once later ones follow (some drop the reasoning) cannot be read that
way; then each assistant turn becomes a sample of its own, seen in the context that `generate` would show it in.
"""

from __future__ import annotations

import os
import re
from typing import Any

from dist_subspace.errors import UsageError
from dist_subspace.training.data.columns import Row
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.samples import Sample, fit

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '<|im_end|>') }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Taken where a tokenizer has none: ChatML, but the assistant ends with the end of sequence, because the vocabulary
is not grown and `generate` stops there."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


def give_chat_template(tokenizer: Any) -> None:
    """A tokenizer without a chat template gets the default one, so that it is saved beside the adapter."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE


def chat(rows: list[Row], encoder: Encoder) -> list[list[Sample | None]]:
    """messages: a list of {role, content}; a conversation without an assistant turn is left out."""
    give_chat_template(encoder.tokenizer)
    return [_conversation(row, _messages(row), encoder) for row in rows]


def _conversation(row: Row, messages: list[Message], encoder: Encoder) -> list[Sample | None]:
    limit = row.settings.max_length
    if encoder.tokenizer.is_fast and GENERATION.search(encoder.tokenizer.chat_template):
        return [fit(*_marked_by_template(row, messages, encoder.tokenizer), limit)]
    whole = _render(row, messages, encoder.tokenizer)
    spans = [
        _turn(row, messages[: i + 1], encoder.tokenizer)
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if all(whole.startswith(through) for _, through in spans):
        borders = [(before, len(through.rstrip())) for before, through in spans]
        return [fit(*_between(whole, borders, encoder), limit)]
    return [fit(*_between(through, [(before, len(through.rstrip()))], encoder), limit) for before, through in spans]


def _turn(row: Row, messages: list[Message], tokenizer: Any) -> tuple[int, str]:
    """(where the last turn's own text begins, the conversation through that turn)."""
    through = _render(row, messages, tokenizer)
    before = _render(row, messages[:-1], tokenizer, add_generation_prompt=True)
    return len(os.path.commonprefix([before, through])), through


def _between(whole: str, borders: list[tuple[int, int]], encoder: Encoder) -> tuple[list[int], list[bool]]:
    """Ids of the rendered text, and which of them lie between the (start, end) borders, in characters.

    The border of a turn in tokens is how far the ids of the text up to there agree with the whole's.
    """
    cuts = [cut for border in borders for cut in border]
    ids, *parts = encoder.ids([whole, *(whole[:cut] for cut in cuts)])
    places = [len(os.path.commonprefix([ids, part])) for part in parts]
    trained = [False] * len(ids)
    for start, end in zip(places[::2], places[1::2]):
        trained[start:end] = [True] * (end - start)
    return ids, trained


def _marked_by_template(row: Row, messages: list[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    found = _render(row, messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _render(row: Row, messages: list[Message], tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **({"tokenize": False} | options))
    except Exception as error:  # a template raises what it likes for roles or orders that it does not take
        raise UsageError(f"{row}: the tokenizer's chat template refuses these messages: {error}") from error


def _messages(row: Row) -> list[Message]:
    messages = row.value("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(
            f"{row} has no list in column {row.settings.column('messages')!r}; accepted: [{{role, content}}]"
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UsageError(f"{row} has a message that is no object with role and content")
    # A null content stands beside tool calls; the default template, and many others, want text.
    return [{**message, "content": "" if message["content"] is None else message["content"]} for message in messages]
