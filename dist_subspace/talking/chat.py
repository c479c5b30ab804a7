"""A conversation with an adapter: its turns, and what is done with a line that the user writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dist_subspace.adapted.opened import Opened
from dist_subspace.atomic_files import storage_error
from dist_subspace.errors import UsageError
from dist_subspace.generation.answers import Answer
from dist_subspace.generation.streaming import streamed
from dist_subspace.subspace import disabled
from dist_subspace.training.data.prompting import Prompting

HELP = """\
/reset        begin a new conversation
/base [TEXT]  the base model's own answer, to TEXT or to the last question; the conversation stays as it is
/save FILE    append the conversation to a .jsonl, in the format of the training's data
/help         this list
/exit, /quit  leave; so does Ctrl-D
Ctrl-C ends an answer, and not the chat. A line that ends with \\ goes on in the next one."""
_LEAVING = ("/exit", "/quit")
_COMMANDS = ("/reset", "/base", "/save", "/help", *_LEAVING)


@dataclass
class Chat:
    """history: the turns so far; in a format other than chat each prompt stands alone, and the last one is kept to be saved.

    show: is given an answer piece by piece; say: a sentence about the chat; stopped: whether the answer shall end; writes:
    whether this rank saves.
    """

    opened: Opened
    prompting: Prompting
    config: GenerationConfig
    show: Callable[[str], object]
    say: Callable[[str], object]
    stopped: Callable[[], bool] = lambda: False
    system: str | None = None
    tools: list[Any] | None = None
    compare_base: bool = False
    seed: int = 0
    writes: bool = True

    def __post_init__(self) -> None:
        self.history: list[dict[str, str]] = []
        self.drawn = 0  # answers so far: each draws anew

    def heard(self, line: str) -> bool:
        """Collective where the model is split: do what a line asks for; False where it asks to leave."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        try:
            if word in _LEAVING:
                return False
            if not word.startswith("/"):
                self.ask(line)
            elif word in _COMMANDS:
                getattr(self, f"_{word[1:]}")(rest.strip())
            else:
                self.say(f"{word} is no command; accepted: {', '.join(_COMMANDS)}")
        except (UsageError, OSError) as error:
            self.say(str(error))
        return True

    def ask(self, text: str) -> Answer:
        """Collective where the model is split: the answer to a turn of the user, both of which are then part of the history.

        Raises:
            UsageError: the conversation is too long for the model; it stays as it was before the turn.
        """
        if self.compare_base:
            self.say("base:")
            self._base(text)
            self.say("adapter:")
        answer = self._answered(text, self._turns())
        self.history = [
            *self._turns(),
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer.text},
        ]
        return answer

    def _turns(self) -> list[dict[str, str]]:
        return self.history if self.prompting.settings.format == "chat" else []

    def _answered(self, text: str, history: list[dict[str, str]]) -> Answer:
        columns = {} if self.tools is None else {"tools": self.tools}
        record = self.prompting.record(text, system=self.system, history=history, **columns)
        (prompt,) = self.prompting.of_records([record], source="the chat")
        answer = streamed(
            self.opened.model,
            self.opened.tokenizer,
            prompt.ids,
            self.config,
            self.show,
            seed=self.seed + self.drawn,
            stopped=self.stopped,
        )
        self.show("\n")
        self.drawn += 1
        return answer

    def _base(self, text: str) -> None:
        history = self._turns()
        if not text:
            if not self.history:
                raise UsageError("/base has no question yet; accepted: /base TEXT")
            text, history = self.history[-2]["content"], history[:-2]
        with disabled(self.opened.model):
            self._answered(text, history)

    def _reset(self, _: str) -> None:
        self.history = []
        self.say("a new conversation")

    def _help(self, _: str) -> None:
        self.say(HELP)

    def _save(self, file: str) -> None:
        if not file or not self.history:
            raise UsageError("/save needs a file and a conversation; accepted: /save FILE, after a first answer")
        if not self.writes:
            return
        path = Path(file).expanduser()
        try:
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.as_record(), ensure_ascii=False) + "\n")
        except OSError as error:
            raise storage_error(path, error) from error
        self.say(f"appended to {path}")

    def as_record(self) -> dict[str, Any]:
        """The conversation as a record of training data."""
        columns = {} if self.tools is None else {"tools": self.tools}
        record = self.prompting.record(
            self.history[-2]["content"], system=self.system, history=self._turns()[:-2], **columns
        )
        settings, answer = self.prompting.settings, self.history[-1]
        if settings.format == "chat":
            record[settings.column("messages")].append(answer)
            return record
        if settings.format == "text":
            return {settings.column("text"): record[settings.column("text")] + answer["content"]}
        return record | {settings.column("output" if settings.format == "alpaca" else "completion"): answer["content"]}
