"""Data for a recipe, in its format, and byte tokens that know a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.tiny_run import make_tokenizer

CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "alpaca": lambda n: {"instruction": f"say {n}", "output": f"{n} " * 3},
    "completion": lambda n: {"prompt": f"{n} comes before", "completion": f" {n + 1}"},
    "classification": lambda n: {"sentence": f"{n} is a number", "label": n % 2},
    "chat": lambda n: {
        "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} " * 3}]
    },
    "chat-preference": lambda n: {
        "prompt": [{"role": "user", "content": f"say {n}"}],
        "chosen": [{"role": "assistant", "content": f"{n} " * 3}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write_records(file: Path, kind: str, count: int) -> Path:
    file.write_text("".join(json.dumps(RECORDS[kind](number)) + "\n" for number in range(count)))
    return file
