"""Prefix-tuning (arXiv 2101.00190): `K = [P_K; K]`, `V = [P_V; V]`, n learned keys and values in every self-attention.

The matrix `(n, 2 L d_kv)` holds, for each layer in turn, its keys and its values, as PEFT's files do. Prefix keys are not
rotated; real tokens stand n positions later. With `projection`, the matrix is `tanh(E W_1ᵀ + b_1) W_2ᵀ + b_2` from E (n, d), and
only what comes out is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dist_subspace.options import choice, flag, whole
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.peft_words import Entries
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.core.targets import Choice
from dist_subspace.subspace.virtual_tokens import stacks
from dist_subspace.subspace.virtual_tokens.attention import attention_modules, geometry, redirect
from dist_subspace.subspace.virtual_tokens.part import COUNT, EncodedTokens, TokenWords, check_side, linear_parameters
from dist_subspace.subspace.virtual_tokens.prefix_hooks import PrefixHooks
from dist_subspace.subspace.virtual_tokens.slots import Slot

STD = 0.02


@register(
    MethodInfo(
        name="prefix",
        category="reconstruction, mode 2",
        reference="2101.00190",
        summary="learned keys and values before those of every self-attention",
        learning_rate=LearningRate(3e-1, 3e-2, 1e-2, "T0-3B in (IA)³'s repository"),
        targets="every attention",
        uses_targets=False,
        mergeable=False,
        identity=False,
        options={
            **COUNT,
            "init": choice("normal", "initial keys and values: normal with std 0.02, or zero", "zero"),
            "projection": flag(False, "make them by a two-layer network, which is dropped when they are saved"),
            "projection_dim": whole(512, "width of that network"),
        },
        count="2 n d_kv",
    )
)
class Prefix(EncodedTokens):
    attribute = "prefix_tokens"

    @classmethod
    def file_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "projection": False}

    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        for modules in attention_modules(choice.model):  # refuses a family before anything is done to the model
            for module in modules:
                geometry(module)
        return super().sites(choice)

    @classmethod
    def check_fits(cls, tokens: Tensor, described: Entries, config: Any) -> None:
        check_side("number of layers", described.get("num_layers"), config.num_hidden_layers)

    def measure(self, model: nn.Module) -> int:
        self.embedding_width = stacks.input_width(model)
        self.layers = [[geometry(module) for module in modules] for modules in attention_modules(model)]
        self.sizes = [2 * heads * head_dim for stack in self.layers for heads, head_dim in stack]
        return sum(self.sizes)

    @property
    def has_encoder(self) -> bool:
        return bool(self.settings.options["projection"])

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        spread = STD if settings.options["init"] == "normal" else 0.0
        if not self.has_encoder:
            super().create(settings, generator)
            nn.init.normal_(self.prompt_embeddings, std=spread, generator=generator)
            return
        hidden = int(settings.options["projection_dim"])
        self.embedding = nn.Parameter(torch.randn(self.count, self.embedding_width, generator=generator))
        self.down, self.down_bias = linear_parameters(hidden, self.embedding_width, generator)
        self.up = nn.Parameter(torch.randn(self.width, hidden, generator=generator) * spread)
        self.up_bias = nn.Parameter(torch.zeros(self.width))

    def encoded(self) -> Tensor:
        return linear(torch.tanh(linear(self.embedding, self.down, self.down_bias)), self.up, self.up_bias)

    def connect(self, model: nn.Module) -> None:
        start = 0
        for stack, modules in zip(stacks.stacks(model), attention_modules(model), strict=True):
            slots = [Slot(self, *geometry(module)) for module in modules]
            for module, slot in zip(modules, slots, strict=True):
                redirect(module, slot)
            PrefixHooks(self, model, stack, slots, slice(start, start + len(modules)))
            start += len(modules)

    def pieces(self, matrix: Tensor, layers: slice) -> list[Tensor]:
        """Of some layers, the keys and values, each `(2, heads, n, d_head)`."""
        shapes = [shape for stack in self.layers for shape in stack][layers]
        columns = matrix.split(self.sizes, dim=1)[layers]
        return [x.view(self.count, 2, *shape).permute(1, 2, 0, 3) for x, shape in zip(columns, shapes, strict=True)]


@register_peft(Prefix)
class PrefixWords(TokenWords[Prefix]):
    peft_type = "PREFIX_TUNING"
    without_effect = ("prefix_projection", "encoder_hidden_size", "init_weights")
    tasks = ("CAUSAL_LM",)
    one_stack = False

    def model_entries(self, part: Prefix) -> dict[str, Any]:
        heads, head_dim = part.layers[0][0]
        shape = {"token_dim": heads * head_dim, "num_attention_heads": heads, "num_layers": len(part.sizes)}
        return super().model_entries(part) | shape | {"prefix_projection": False}

    def agrees(self, part: Prefix) -> bool:
        """PEFT has one width for all layers, and no prefix in an encoder."""
        return super().agrees(part) and len(part.layers) == 1 and len(set(part.layers[0])) == 1
