"""What the data pipeline needs to know, with the field names of the configuration's `data` section."""

from __future__ import annotations

from dataclasses import dataclass

from dist_subspace.errors import UsageError, unknown_name

FORMATS = ("alpaca", "chat", "completion", "text", "classification")
COLUMNS = ("text", "prompt", "completion", "instruction", "input", "output", "messages", "label")
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that reach the chat template where a record has them."""
TRUNCATIONS = ("turns", "tokens")


@dataclass(frozen=True)
class DataSettings:
    """The configuration's `data` section. Column names are None where the format's own name holds."""

    train: str | list[tuple[str, float]]
    """A file or Hub data set, or several with weights (how often a file's samples come in one epoch)."""
    eval: str | float | None = None
    """A file or Hub data set, or the fraction of the training data that is held out."""
    format: str = "alpaca"
    """One of alpaca, chat, completion, text, classification."""
    max_length: int = 2048
    """The most tokens of a sample, and of a packed row."""
    packing: bool = True
    template: str | None = None
    """Replaces alpaca's prompt: text with {instruction}, {input} or any other column."""
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    instruction_field: str | None = None
    input_field: str | None = None
    output_field: str | None = None
    messages_field: str | None = None
    label_field: str | None = None
    tools_field: str | None = None
    documents_field: str | None = None
    chat_template_kwargs_field: str | None = None
    truncation: str = "turns"
    """What a conversation that is too long loses first: its oldest turns, or tokens from the left."""
    split: str = "train"
    """The split of a Hub data set that is trained on."""
    eval_split: str = "validation"
    """The split of a Hub data set that is evaluated on."""
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown_name("data.format", self.format, FORMATS)
        if self.truncation not in TRUNCATIONS:
            raise unknown_name("data.truncation", self.truncation, TRUNCATIONS)
        if self.max_length < 2:
            raise UsageError(
                f"data.max_length is {self.max_length}; accepted: 2 or more (the second token is predicted)"
            )
        if isinstance(self.eval, float | int) and not 0 < self.eval < 1:
            raise UsageError(f"data.eval is {self.eval}; accepted: a file, or a fraction between 0 and 1")
        for path, weight in self.sources():
            if not weight > 0 or weight == float("inf"):
                raise UsageError(f"data.train gives {path!r} the weight {weight}; accepted: a finite number above 0")
        if not self.sources():
            raise UsageError(
                "data.train is an empty list; accepted: a file, a Hub data set, or a list of {path, weight}"
            )

    def sources(self) -> list[tuple[str, float]]:
        """The training sources as (path, weight)."""
        return [(self.train, 1.0)] if isinstance(self.train, str) else [(p, float(w)) for p, w in self.train]

    def column(self, name: str) -> str:
        """What the column `name` of the format is called in this data."""
        return getattr(self, f"{name}_field") or name
