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
    texts, whole = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    files = [
        Case("causal-lm", t, "whole", saved_by="AutoModelForImageTextToText")
        for t in whole
        if t in texts and texts[t] != whole[t]
    ]
    return plain + files + [Case(task, t, name, changes) for name, changes, members in VARIANTS for task, t in members]


def chosen(names: list[str]) -> list[Case]:
    """The cases whose name, task or model type is among `names`; all of them where there is none."""
    return [c for c in all_cases() if not names or {c.name, c.task, c.model_type} & set(names)]


def _named(task: str, *model_types: str) -> tuple[tuple[str, str], ...]:
    return tuple((task, model_type) for model_type in model_types)


_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
_ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear"} | _ROPE,
    "dynamic": {"rope_type": "dynamic"} | _ROPE,
    "yarn": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0} | _ROPE,
    "longrope": {"rope_type": "longrope", "short_factor": _FACTORS, "long_factor": _FACTORS[::-1]} | _ROPE,
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _ROPE,
}
_ROTATED = ("llama", "qwen2", "mistral", "qwen3", "gemma", "olmo2", "starcoder2", "phi")
_TIED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "opt",
    "gpt_neox",
    "olmo",
    "phi",
    "cohere",
    "stablelm",
    "granite",
    "smollm3",
)
_BIASED = ("llama", "qwen3", "olmo", "granite", "helium", "glm4", "apertus", "seed_oss")

# What is changed, of which families.
VARIANTS: tuple[tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...]], ...] = (
    *((name, (("rope_parameters", rope),), _named("causal-lm", *_ROTATED)) for name, rope in _ROTARY.items()),
    ("tied", (("tie_word_embeddings", True),), _named("causal-lm", *_TIED)),
    (
        "untied",
        (("tie_word_embeddings", False),),
        _named("causal-lm", *_TIED, "gpt2", "bloom") + _named("masked-lm", "bert", "roberta"),
    ),
    (
        "untied",
        (("tie_word_embeddings", False),),
        _named("seq2seq-lm", "t5", "mt5", "umt5", "longt5", "bart", "switch_transformers"),
    ),
    ("bias", (("attention_bias", True), ("mlp_bias", True)), _named("causal-lm", *_BIASED)),
    ("clip", (("clip_qkv", 0.5),), _named("causal-lm", "olmo", "olmoe")),
    (
        "one-head",
        (("num_key_value_heads", 1),),
        _named("causal-lm", "llama", "qwen2", "mistral", "starcoder2", "gemma"),
    ),
    ("gated", (("feed_forward_proj", "gated-gelu"),), _named("seq2seq-lm", "t5", "longt5")),
    ("old-decoder", (("new_decoder_architecture", False), ("multi_query", False)), _named("causal-lm", "falcon")),
    ("new-decoder", (("new_decoder_architecture", True),), _named("causal-lm", "falcon")),
    ("sequential", (("use_parallel_residual", False),), _named("causal-lm", "gpt_neox")),
    ("multi-query", (("multi_query", False),), _named("causal-lm", "gpt_bigcode")),
    ("post-norm", (("do_layer_norm_before", False), ("word_embed_proj_dim", 20)), _named("causal-lm", "opt")),
)
