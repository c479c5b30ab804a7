"""What a record becomes, by the tokenizer's own calls: ids and labels as transformers takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.keys.begun import Row
from tests.keys.bench import UNSET, Bench
from tests.tiny_run import make_tokenizer

IGNORED = -100
TEMPLATE = (
    "<s>{% if tools %}[{{ tools | map(attribute='function.name') | join(',') }}]{% endif %}"
    "{% if documents %}({{ documents | map(attribute='text') | join(',') }}){% endif %}{{ mood or '' }}"
    "{% for message in messages %}{{ message['role'][0] }}:"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }};{% endif %}{% endfor %}"
)


def marked(bench: Bench) -> str:
    """The folder of a tokenizer that begins every text with a mark, with a chat template of its own."""
    folder = bench.folder / "marked"
    if not folder.is_dir():
        tokenizer = make_tokenizer()
        mark = [("<s>", 0)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=mark)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(bench: Bench) -> Any:
    return AutoTokenizer.from_pretrained(marked(bench))


def usual(bench: Bench, records: list[dict[str, Any]], form: str, **changes: Any) -> dict[str, Any]:
    """The changes for records of another format: section__key."""
    name = f"{form}-{len(list(bench.folder.glob('*.jsonl')))}.jsonl"
    given = {"data.train": bench.write(name, records), "data.format": form, "data.max_length": 128}
    given["model.tokenizer"] = marked(bench)
    return given | {key.replace("__", "."): value for key, value in changes.items()}


def classifying(bench: Bench, records: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The same for texts with labels, which are never packed; an adapter of a language model is no beginning there."""
    head = {"model__task": "classification", "subspace__init_from": UNSET, "subspace__rank": 2, "data__packing": True}
    return usual(bench, records, "classification", **head, **changes)


def answered(tokenizer: Any, prompt: str, answer: str) -> Row:
    """The prompt is read, the answer and the end of sequence are trained."""
    head = tokenizer(prompt).input_ids
    whole = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]
    assert whole[: len(head)] == head
    return whole, [IGNORED] * len(head) + whole[len(head) :]


def all_trained(tokenizer: Any, text: str) -> Row:
    """Every token is trained but the first, which nothing predicts."""
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return ids, [IGNORED, *ids[1:]]


def conversed(tokenizer: Any, messages: Sequence[dict[str, Any]], **given: Any) -> Row:
    """What the template marks as the assistant's is trained."""
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **given)
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return found["input_ids"], [i if spoken else IGNORED for i, spoken in pairs]


def assert_same(found: Iterable[Row], expected: Iterable[Row], what: str) -> None:
    """The same rows, as often, in whatever order."""
    one, other = sorted(found), sorted(expected)
    assert one == other, f"{what}: {len(one)} rows, and {len(other)} are right; the first that differs: " + str(
        next((pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]), None)
    )
