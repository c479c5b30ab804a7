"""What transformers calls a model class for a task, and by which auto class it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

# Our name of a task -> the auto class that makes a model for it.
AUTO_CLASSES: Mapping[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "base": "AutoModel",
}
# Ending of a class's name -> the task. `LMHeadModel` is the older word (GPT-2); models of vision and language generate
# conditionally too, most of them with a decoder alone.
TASKS_BY_ENDING: Mapping[str, str] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "seq2seq-lm",
}
# Tasks whose model gives every token of a vocabulary a probability, in a text that grows.
GENERATING = ("causal-lm", "seq2seq-lm")
# Endings of classes whose head reads every token, and not the first alone.
READS_EVERY_TOKEN = ("CausalLM", "LMHeadModel", "MaskedLM", "TokenClassification", "QuestionAnswering")


def task_of_class(name: str) -> str:
    """Our name of the task of a transformers class; `base` for one that is for none."""
    return next((task for ending, task in TASKS_BY_ENDING.items() if name.endswith(ending)), "base")


def generates_text(name: str) -> bool:
    """Whether a transformers class of that name is a language model that generates."""
    return task_of_class(name) in GENERATING


def reads_every_token(name: str) -> bool:
    """Whether the head of a transformers class of that name reads every token."""
    return name.endswith(READS_EVERY_TOKEN)
