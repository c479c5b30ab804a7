"""A chat template is read from wherever a model's files keep it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_subspace.errors import UsageError
from dist_subspace.loading.tokenizer import load_tokenizer
from tests.training.data.chat_for_tests import chat_tokenizer

PLAIN, TOOLS = "{{ messages[0].content }}", "{{ tools[0].name }}: {{ messages[0].content }}"
NAMED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]


def folder_with(tmp_path: Path, stories260k: Path, kind: str) -> Path:
    """A model folder without a template: with tokenizer.json, or with a bare sentencepiece file."""
    folder = tmp_path / kind
    if kind == "fast":
        tokenizer = chat_tokenizer("byte-level", "chatml")
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
    else:
        folder.mkdir()
        shutil.copy(stories260k / "tokenizer.model", folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folder


def put(folder: Path, place: str) -> None:
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": PLAIN}))
    elif place == "chat_template.jinja":
        (folder / place).write_text(PLAIN)
    elif place == "additional_chat_templates":
        (folder / "chat_template.jinja").write_text(PLAIN)
        (folder / place).mkdir()
        (folder / place / "tool_use.jinja").write_text(TOOLS)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template: Any = NAMED if place == "a list" else PLAIN
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
@pytest.mark.parametrize(
    "place", ["a text", "a list", "chat_template.jinja", "additional_chat_templates", "chat_template.json"]
)
def test_a_template_is_read_from_every_place_that_files_have_it_in(
    tmp_path: Path, stories260k: Path, kind: str, place: str
) -> None:
    folder = folder_with(tmp_path, stories260k, kind)
    put(folder, place)
    tokenizer = load_tokenizer(str(folder))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi"
    if place in ("a list", "additional_chat_templates"):
        given = [{"name": "look"}]
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tools=given, tokenize=False)
        assert tokenizer.apply_chat_template(messages, tools=given, tokenize=False) == expected == "look: hi"


def test_a_processor_file_without_a_template_is_refused_and_one_beside_the_tokenizers_own_is_not_taken(
    tmp_path: Path, stories260k: Path
) -> None:
    folder = folder_with(tmp_path, stories260k, "fast")
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(UsageError, match=r"chat_template\.json"):
        load_tokenizer(str(folder))
    put(folder, "a text")
    assert load_tokenizer(str(folder)).chat_template == PLAIN
