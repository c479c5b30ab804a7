"""The configurations: every model type of transformers' auto mappings, by task, and variants of some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.exceptions import special
from tests.families.shrink import small
from tests.families.variants import VARIANTS

# task of load_frozen -> transformers' mapping, and the auto class
TASKS: dict[str, tuple[str, str]] = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq-lm": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
}


@dataclass(frozen=True)
class Case:
    """One configuration: `model_type` of transformers, task of `load_frozen`, and what a variant changes."""

    task: str
    model_type: str
    variant: str = ""
    changes: tuple[tuple[str, Any], ...] = ()
    saved_by: str = ""  # the auto class that makes the file, where it is another than the task's

    @property
    def name(self) -> str:
        return f"{self.task}/{self.model_type}{f'+{self.variant}' if self.variant else ''}"

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, TASKS[self.task][1])

    def config(self) -> PretrainedConfig:
        """The small configuration; raises what transformers raises where it cannot be made."""
        changes = dict(special(self.task, self.model_type).changes) | dict(self.changes)
        return small(CONFIG_MAPPING[self.model_type](), changes)


def all_cases() -> list[Case]:
    """Every model type under every task that transformers has for it, files of whole vision-language models read as their text
    model, and variants of some families."""
    plain = [
        Case(task, model_type) for task, (mapping, _) in TASKS.items() for model_type in getattr(modeling_auto, mapping)
    ]
    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    whole = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    both = [model_type for model_type in whole if texts.get(model_type, whole[model_type]) != whole[model_type]]
    files = [Case("causal-lm", model_type, "whole", saved_by="AutoModelForImageTextToText") for model_type in both]
    return plain + files + [Case(task, t, name, changes) for name, changes, members in VARIANTS for task, t in members]


def chosen(names: list[str]) -> list[Case]:
    """The cases whose name, task or model type is among `names`, in the order of these; all of them where there is none."""
    cases = all_cases()
    found = [case for name in names for case in cases if name in (case.name, case.task, case.model_type)]
    return list({case.name: case for case in found}.values()) if names else cases
