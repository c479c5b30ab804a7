"""Prompt-tuning (arXiv 2104.08691): n learned embeddings `(n, d)` stand before those of the input.

They begin as rows of the vocabulary drawn at random, as a text's (`init_text`, which a run's tokenizer reads, or its `init_ids`;
repeated or cut to n), or normal with std 0.02.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import config_of, text_config
from dist_subspace.options import Option, choice, text
from dist_subspace.subspace.core.initial import InitialFromModel, TextOptions
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo, Settings, SubspaceConfig
from dist_subspace.subspace.core.trained import Gathered
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.input_tokens import PLACEMENT, InputTokens, InputTokenWords
from dist_subspace.subspace.virtual_tokens.part import COUNT

STD = 0.02


@register(
    MethodInfo(
        name="prompt",
        category="reconstruction, mode 2",
        reference="2104.08691",
        summary="learned embeddings before those of the input",
        learning_rate=LearningRate(3e-1, 5e-2, 1e-2, "falls as the prefix's"),
        targets="input embeddings",
        uses_targets=False,
        mergeable=False,
        identity=False,
        options={
            **COUNT,
            "init": choice(
                "vocab", "initial embeddings: rows of the vocabulary, normal, or those of a text", "normal", "text"
            ),
            "init_text": text("the text, where init is text; needs a tokenizer, which a run has"),
            "init_ids": Option(
                (),
                "the text's token ids, in the place of init_text",
                lambda v: isinstance(v, list | tuple) and all(isinstance(i, int) and i >= 0 for i in v),
                "a list of token ids",
            ),
            **PLACEMENT,
        },
        count="n d",
    )
)
class Prompt(InputTokens, TextOptions, InitialFromModel):
    @classmethod
    def complete(cls, settings: Settings, config: SubspaceConfig) -> Settings:
        options = settings.options
        if options["init"] == "text" and not (options["init_text"] or options["init_ids"]):
            raise UsageError("subspace.options.init is 'text' without one; accepted: with init_text, or init_ids")
        return settings

    @classmethod
    def read_text(cls, config: SubspaceConfig, tokenizer: Any) -> SubspaceConfig:
        text = config.options.get("init_text")
        if text is None or config.options.get("init_ids"):
            return config
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"subspace.options.init_text is {text!r}, which has no token")
        return replace(config, options={**config.options, "init_ids": list(ids)})

    def measure(self, model: nn.Module) -> int:
        self.vocabulary = int(text_config(config_of(model)).vocab_size)
        return super().measure(model)

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        super().create(settings, generator)
        nn.init.normal_(self.prompt_embeddings, std=STD, generator=generator)
        self.first_ids = self._rows(generator) if settings.options["init"] != "normal" else []

    def read_initial_values(self, model: nn.Module, gathered: Gathered) -> None:
        if not self.first_ids:
            return
        embeddings: Any = stacks.stacks(model)[0].get_input_embeddings()
        ids = torch.tensor(self.first_ids)
        parameters = list(embeddings.parameters())
        with gathered(parameters), torch.no_grad():
            self.prompt_embeddings.data.copy_(embeddings(ids.to(parameters[0].device)))

    def _rows(self, generator: torch.Generator) -> list[int]:
        options = self.settings.options
        if options["init"] == "vocab":
            return torch.randint(self.vocabulary, (self.count,), generator=generator).tolist()
        given = [int(i) for i in options["init_ids"]]
        if not given:
            raise UsageError("subspace.options.init_text needs a tokenizer, which attach has not; accepted: init_ids")
        if max(given) >= self.vocabulary:
            raise UsageError(f"subspace.options.init_ids has {max(given)}; accepted: ids below {self.vocabulary}")
        return [given[i % len(given)] for i in range(self.count)]


@register_peft(Prompt)
class PromptWords(InputTokenWords[Prompt]):
    peft_type = "PROMPT_TUNING"
    without_effect = (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )
    read_options: ClassVar[Entries] = {"init": "normal", "placement": "front"}
