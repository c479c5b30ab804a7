"""P-tuning (arXiv 2103.10385): the embeddings that stand before the input come from an encoder over n learned ones, E (n, d).

`mlp`: d→h→h→d with ReLU between. `lstm`: bidirectional, two layers, d→h, then 2h→2h, ReLU, 2h→d, as PEFT has it. The encoder is
dropped when the adapter is saved: the file holds what it made, and loads as `none`, the embeddings themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from dist_subspace.options import choice, whole
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.virtual_tokens.input_tokens import PLACEMENT, InputTokens, InputTokenWords
from dist_subspace.subspace.virtual_tokens.part import COUNT, EncodedTokens, linear_parameters

LSTM_LAYERS = 2


@register(
    MethodInfo(
        name="p-tuning",
        category="reconstruction, mode 2",
        reference="2103.10385",
        summary="encoded embeddings before those of the input",
        learning_rate=LearningRate(1e-2, 2e-3, 1e-4, "falls as LoRA's"),
        targets="input embeddings",
        uses_targets=False,
        mergeable=False,
        identity=False,
        options={
            **COUNT,
            "encoder": choice("mlp", "what makes the embeddings: mlp, lstm, or none (a saved adapter)", "lstm", "none"),
            "hidden": whole(None, "width h of the encoder; null: that of the embeddings"),
            **PLACEMENT,
        },
        count="n d + (d h + h) + (h² + h) + (h d + d)",
    )
)
class PTuning(InputTokens, EncodedTokens):
    @classmethod
    def file_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "encoder": "none"}

    @property
    def has_encoder(self) -> bool:
        return bool(self.settings.options["encoder"] != "none")

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        d, h = self.width, int(settings.options["hidden"] or self.width)
        self.encoder, self.hidden = settings.options["encoder"], h
        if not self.has_encoder:
            super().create(settings, generator)
            nn.init.normal_(self.prompt_embeddings, generator=generator)
            return
        self.embedding = nn.Parameter(torch.randn(self.count, d, generator=generator))
        widths = [d, h, h, d] if self.encoder == "mlp" else [2 * h, 2 * h, d]
        self.heads = len(widths) - 1
        for number, (before, after) in enumerate(pairwise(widths)):
            weight, bias = linear_parameters(after, before, generator)
            setattr(self, f"head_{number}", weight)
            setattr(self, f"head_{number}_bias", bias)
        if self.encoder == "lstm":
            self._create_lstm(d, h, generator)

    def _create_lstm(self, d: int, h: int, generator: torch.Generator) -> None:
        """Weights in the order in which torch takes them: layer by layer, forwards and backwards, uniform within 1/√h."""
        self.lstm_names: list[str] = []
        for layer in range(LSTM_LAYERS):
            for way in ("forward", "backward"):
                shapes = {
                    "ih": (4 * h, 2 * h if layer else d),
                    "hh": (4 * h, h),
                    "ih_bias": (4 * h,),
                    "hh_bias": (4 * h,),
                }
                for kind, shape in shapes.items():
                    name = f"lstm_{layer}_{way}_{kind}"
                    value = torch.empty(shape).uniform_(-(h**-0.5), h**-0.5, generator=generator)
                    setattr(self, name, nn.Parameter(value))
                    self.lstm_names.append(name)

    def encoded(self) -> Tensor:
        x: Tensor = self._lstm(self.embedding) if self.encoder == "lstm" else self.embedding
        for number in range(self.heads):
            x = linear(x, self.get_parameter(f"head_{number}"), self.get_parameter(f"head_{number}_bias"))
            x = relu(x) if number + 1 < self.heads else x
        return x

    def _lstm(self, x: Tensor) -> Tensor:
        """`(n, d)` to `(n, 2h)`."""
        weights: list[Tensor] = [self.get_parameter(name) for name in self.lstm_names]
        start = x.new_zeros(2 * LSTM_LAYERS, 1, self.hidden)
        return torch.lstm(x[None], (start, start), weights, True, LSTM_LAYERS, 0.0, self.training, True, True)[0][0]


@register_peft(PTuning)
class PTuningWords(InputTokenWords[PTuning]):
    peft_type = "P_TUNING"
    without_effect = (
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    )
    read_options: ClassVar[Entries] = {"encoder": "none", "placement": "front"}

    def model_entries(self, part: PTuning) -> dict[str, Any]:
        kind = "LSTM" if part.encoder == "lstm" else "MLP"
        return super().model_entries(part) | {
            "encoder_reparameterization_type": kind,
            "encoder_hidden_size": part.hidden,
        }
