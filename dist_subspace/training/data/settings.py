"""What the data pipeline needs to know, with the field names of the configuration's `data` section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = ("text", "prompt", "completion", "instruction", "input", "output", "messages", "label")
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that reach the chat template where a record has them."""
PREFERENCE_COLUMNS = ("chosen", "rejected")
RENAMED = (*COLUMNS, *TEMPLATE_COLUMNS, *PREFERENCE_COLUMNS)
PAIRED = ("preference", "chat-preference")
"""Formats of a better and a worse answer to one prompt."""
UNPAIRED = ("unpaired-preference", "chat-unpaired-preference")
"""Formats of one answer, and whether it is desirable."""
_PROMPTED_AS = {
    "preference": "completion",
    "unpaired-preference": "completion",
    "chat-preference": "chat",
    "chat-unpaired-preference": "chat",
}
PROMPTS = "prompts"
"""The entry of an adapter's description that says how the prompts of its training were written."""


@dataclass(frozen=True)
class DataSettings:
    """The configuration's `data` section, which has checked the values. Column names are None where the format's own hold."""

    train: str | list[tuple[str, float]]
    """A file or Hub data set, or several with weights (how often a file's samples come in one epoch)."""
    eval: str | float | None = None
    """A file or Hub data set, or the fraction of the training data that is held out."""
    format: str = "alpaca"
    """A name of `formats.FORMATS`."""
    max_length: int = 2048
    """The most tokens of a sample, at least 2: the second token is predicted."""
    template: str | None = None
    """Replaces alpaca's prompt: text with {instruction}, {input} or any other column."""
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    instruction_field: str | None = None
    input_field: str | None = None
    output_field: str | None = None
    chosen_field: str | None = None
    rejected_field: str | None = None
    messages_field: str | None = None
    label_field: str | None = None
    tools_field: str | None = None
    documents_field: str | None = None
    chat_template_kwargs_field: str | None = None
    truncation: str = "turns"
    """What a conversation that is too long loses first: its oldest turns (`turns`), or tokens from the left (`tokens`)."""
    split: str = "train"
    """The split of a Hub data set that is trained on."""
    eval_split: str = "validation"
    """The split of a Hub data set that is evaluated on."""

    def sources(self) -> list[tuple[str, float]]:
        """The training sources as (path, weight)."""
        return [(self.train, 1.0)] if isinstance(self.train, str) else [(p, float(w)) for p, w in self.train]

    def prompts(self) -> dict[str, str]:
        """What of this a prompt depends on, for a file."""
        fields = {name: getattr(self, name) for name in ("template", *(f"{name}_field" for name in RENAMED))}
        return {"format": prompted_as(self.format)} | {
            name: value for name, value in fields.items() if value is not None
        }

    @classmethod
    def of_prompts(cls, entry: Mapping[str, Any]) -> DataSettings:
        """The settings of prompts that have no data yet, from what `prompts` gave or from a section `data`."""
        known = ("format", "template", *(f"{name}_field" for name in RENAMED))
        return cls(train="", **{name: entry[name] for name in known if name in entry})

    def column(self, name: str) -> str:
        """What the column `name` of the format is called in this data."""
        return getattr(self, f"{name}_field") or name


def prompted_as(name: str) -> str:
    """The format whose prompts are those of the format `name`: preferences are about answers to texts, or in conversations."""
    return _PROMPTED_AS.get(name, name)


def is_packable(name: str) -> bool:
    """Whether several samples of the format may share a row: each is trained by itself."""
    return name != "classification" and name not in (*PAIRED, *UNPAIRED)
