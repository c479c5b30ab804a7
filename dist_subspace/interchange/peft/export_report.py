"""What an export says of itself. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dist_subspace.subspace.core.peft_words import Entries


@dataclass(frozen=True)
class ExportReport:
    """What was written. form: direct, lora, scaling, or approximate; error: of an approximation, `‖ΔW - B A‖ / ‖ΔW‖` (Frobenius)
    over all layers as one; errors: the same by layer; notes: who cannot read it; model_class: whose module names it has, where
    a text model belongs to a larger family."""

    folder: str
    method: str
    form: str
    peft_type: str
    rank: int | None
    parameters: int
    error: float | None
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    model_class: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        words = {"direct": "its own files", "lora": "an exact LoRA", "scaling": "exact scalings"}
        lines = [
            f"{self.folder}: {self.method} as PEFT's {self.peft_type} ({words.get(self.form, 'an approximation')}{rank}), "
            f"{self.parameters:,} numbers"
        ]
        if self.error is not None:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(
                f"relative error of the updates: {self.error:.3e} over all layers, at most {self.errors[worst]:.3e} ({worst})"
            )
        return "\n".join([*lines, *self.notes])


def class_note(described: Entries, own_class: Entries | None) -> tuple[str, ...]:
    """Which of the classes of a larger family it is for, where there are two."""
    if own_class is not None:
        return (
            f"for {own_class['name']}, the class that the base's config.json names (for_class trained: its text model)",
        )
    other = described["dist_subspace"].get("own_class")
    return () if other is None else (f"for the text model that was trained, not for the base's own {other['name']}",)


def reader_notes(config: Entries) -> tuple[str, ...]:
    notes = []
    if config["peft_type"] != "LORA":
        notes.append(f"vLLM reads LoRA alone: this folder ({config['peft_type']}) is for PEFT")
    elif config.get("use_dora"):
        notes.append("vLLM does not read DoRA: this folder is for PEFT")
    if config.get("modules_to_save"):
        notes.append("vLLM reads no modules that were trained in full: for it, merge")
    return tuple(notes)
