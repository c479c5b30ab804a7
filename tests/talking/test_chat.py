"""A conversation: what the model is shown of it, and what its commands do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dist_subspace as dsub
from dist_subspace.adapted.opened import Opened, open_adapted
from dist_subspace.generation.settings import greedy
from dist_subspace.talking.chat import Chat
from dist_subspace.training.data.prompting import Prompting
from tests.talking.folders import run_folder
from tests.tiny_run import make_tokenizer

# The model has 128 positions, and a letter is a token.
SHORT = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SHORT
    return open_adapted(run_folder(tmp_path_factory.mktemp("chat"), "chat", tokenizer=tokenizer))


class Talk:
    """A chat, and what it has shown and said."""

    def __init__(self, opened: Opened, form: str = "chat", tokens: int = 5, **given: Any) -> None:
        self.shown, self.said = [], []  # type: ignore[var-annotated]
        prompting = Prompting(opened.settings(format=form), opened.tokenizer)
        config = greedy(opened.model, prompting.stops(), tokens)
        self.chat = Chat(opened, prompting, config, self.shown.append, self.said.append, **given)
        self.opened, self.config = opened, config

    def hear(self, *lines: str) -> bool:
        answers = [self.chat.heard(line) for line in lines]
        return all(answers)

    def expected(self, messages: list[dict[str, str]]) -> str:
        """transformers' own text after the template's own rendering."""
        tokenizer = self.opened.tokenizer
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        made = self.opened.model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=1)
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_each_turn_is_answered_in_the_whole_conversation_and_reset_forgets_it(opened: Opened) -> None:
    talk = Talk(opened, system="K")
    assert talk.hear("a", "b")
    turns = [{"role": "system", "content": "K"}, {"role": "user", "content": "a"}]
    first = talk.expected(turns)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "b"}]
    second = talk.expected(turns)
    assert "".join(talk.shown) == f"{first}\n{second}\n"
    talk.shown.clear()
    talk.hear("/reset", "a")
    assert "".join(talk.shown) == f"{first}\n"


def test_the_base_answers_the_last_question_or_another_and_the_conversation_stays(
    opened: Opened, tmp_path: Path
) -> None:
    talk = Talk(opened)
    talk.hear("a")
    history = list(talk.chat.history)
    talk.shown.clear()
    talk.hear("/base", "/base b")
    with dsub.disabled(opened.model):
        expected = [
            talk.expected([{"role": "user", "content": "a"}]),
            talk.expected([*history, {"role": "user", "content": "b"}]),
        ]
    assert "".join(talk.shown) == "".join(f"{text}\n" for text in expected) and talk.chat.history == history
    compared = Talk(opened, compare_base=True)
    compared.hear("a")
    assert (
        compared.said == ["base:", "adapter:"]
        and "".join(compared.shown) == f"{expected[0]}\n{history[1]['content']}\n"
    )


def test_a_conversation_is_saved_as_a_record_of_training_data(opened: Opened, tmp_path: Path) -> None:
    talk = Talk(opened, system="K")
    talk.hear("/save " + str(tmp_path / "talk.jsonl"), "a", "b", f"/save {tmp_path / 'talk.jsonl'}")
    assert talk.said[0] == "/save needs a file and a conversation; accepted: /save FILE, after a first answer"
    (line,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    roles = [message["role"] for message in json.loads(line)["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    single = Talk(opened, "alpaca")
    single.hear("a", "b", f"/save {tmp_path / 'single.jsonl'}")
    record = json.loads((tmp_path / "single.jsonl").read_text())
    assert record == {"instruction": "b", "output": single.chat.history[-1]["content"]}, "each prompt stands alone"


def test_what_is_no_command_and_what_is_too_long_is_said_and_the_chat_goes_on(opened: Opened) -> None:
    talk = Talk(opened)
    assert talk.hear("/bas", "", "/base", "/help", "x" * 200)
    assert talk.said[0].startswith("/bas is no command; accepted: /reset, /base")
    assert "accepted: /base TEXT" in talk.said[1] and "/save FILE" in talk.said[2]
    assert "tokens; accepted: at most 127" in talk.said[3] and talk.chat.history == []
    assert not talk.hear("/exit") and not talk.hear("/quit ")
