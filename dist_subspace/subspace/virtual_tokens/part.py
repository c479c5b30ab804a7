"""What prefix, prompt and P-tuning have in common: one matrix `(n, width)`, a row a virtual token, read once a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import Option, whole
from dist_subspace.subspace.core.files import file_options_of
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.sites import AddsPositions, OnModel
from dist_subspace.subspace.core.spec import Settings
from dist_subspace.subspace.virtual_tokens.stacks import text_config

EMBEDDINGS = "prompt_embeddings"  # PEFT's name of the one tensor of such an adapter's file
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
COUNT: Mapping[str, Option] = {"num_virtual_tokens": whole(20, "how many virtual tokens")}


class VirtualTokens(OnModel, AddsPositions):
    """A part that stands beside the whole model. Its trained parameters are either the matrix itself (`prompt_embeddings`) or an
    encoder that makes it; the file holds the matrix alone, and a part that is loaded is the plain matrix.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.enabled = True
        self.count = int(settings.options["num_virtual_tokens"])
        config = text_config(model)
        self.num_attention_heads, self.num_layers = int(config.num_attention_heads), int(config.num_hidden_layers)
        self.is_language_model = type(model).__name__.endswith(LANGUAGE_MODELS)
        self.width = self.measure(model)

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        part = cls(site, settings)
        part.create(settings, generator)
        return part

    @classmethod
    def added_positions(cls, settings: Settings) -> int:
        return int(settings.options["num_virtual_tokens"])

    # What a method provides.

    def measure(self, model: nn.Module) -> int:
        """The width of a row; raises UsageError for a model that such tokens cannot be given to."""
        raise TypeError(f"{type(self).__name__} does not say how wide its tokens are")

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        """Make the parameters, float32; by default the matrix itself."""
        self.prompt_embeddings = nn.Parameter(torch.empty(self.count, self.width))

    def matrix(self) -> Tensor:
        """`(n, width)`, differentiable in the trained parameters, which are whole."""
        return self.prompt_embeddings

    # What everyone uses.

    def forward(self) -> Tensor:
        return self.matrix()

    def file_tensors(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.matrix().detach().float()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not hasattr(self, EMBEDDINGS):
            raise UsageError(
                f"the file of a {self.info.name} adapter holds what its encoder made, and not the encoder: it loads with "
                f"options {file_options_of(type(self), self.settings.options)}"
            )
        self.prompt_embeddings.data.copy_(tensors[EMBEDDINGS])

    def peft_shape(self) -> dict[str, Any]:
        return {
            "target_modules": None,
            "num_virtual_tokens": self.count,
            "token_dim": self.width,
            "num_transformer_submodules": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_layers": self.num_layers,
        }

    def agrees_with_peft(self) -> bool:
        """PEFT gives virtual tokens to language models alone; for other heads it has classes of other habits."""
        return self.is_language_model

    def extra_repr(self) -> str:
        return f"method={self.info.name}, num_virtual_tokens={self.count}, width={self.width}"


def linear_parameters(
    out_features: int, in_features: int, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias as torch's own linear layers begin: uniform within 1/√in."""
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight), nn.Parameter(bias)
