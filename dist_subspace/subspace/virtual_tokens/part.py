"""What prefix, prompt and P-tuning have in common: one matrix `(n, width)`, a row a virtual token, read once a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.classes import generates_text
from dist_subspace.families.configuration import config_of, text_config
from dist_subspace.options import Option, whole
from dist_subspace.subspace.core.files import FileOptions
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords
from dist_subspace.subspace.core.sites import AddsPositions, OnModel
from dist_subspace.subspace.core.spec import Settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDINGS = "prompt_embeddings"  # PEFT's name of the one tensor of such an adapter's file
COUNT: Mapping[str, Option] = {"num_virtual_tokens": whole(20, "how many virtual tokens")}


class VirtualTokens(OnModel, AddsPositions):
    """A part that stands beside the whole model. Its one trained parameter is the matrix (`prompt_embeddings`), unless an encoder
    makes that (`EncodedTokens`). The file holds the matrix alone.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.enabled = True
        self.count = int(settings.options["num_virtual_tokens"])
        config = text_config(config_of(model))
        self.num_attention_heads, self.num_layers = int(config.num_attention_heads), int(config.num_hidden_layers)
        self.is_language_model = generates_text(type(model).__name__)
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

    @classmethod
    def check_fits(cls, tokens: Tensor, described: Entries, config: PretrainedConfig) -> None:
        """Raises UsageError for a file's tokens `(n, width)` of another model than one with this text configuration."""
        check_side("width", tokens.shape[1], config.hidden_size)

    # What everyone uses.

    def forward(self) -> Tensor:
        return self.matrix()

    def file_tensors(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.matrix().detach().float()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.prompt_embeddings.data.copy_(tensors[EMBEDDINGS])

    def extra_repr(self) -> str:
        return f"method={self.info.name}, num_virtual_tokens={self.count}, width={self.width}"


class EncodedTokens(VirtualTokens, FileOptions):
    """Virtual tokens that an encoder may make. The encoder is not saved: a part that is loaded is the plain matrix."""

    @property
    def has_encoder(self) -> bool:
        """Whether the part's settings give it an encoder."""
        raise NotImplementedError

    def encoded(self) -> Tensor:
        """The matrix that the encoder makes, `(n, width)`."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        return self.encoded() if self.has_encoder else super().matrix()

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.has_encoder:
            raise UsageError(
                f"the file of a {self.info.name} adapter holds what its encoder made, and not the encoder: it loads with "
                f"options {self.file_options(self.settings.options)}"
            )
        super().load_file_tensors(tensors)


V = TypeVar("V", bound=VirtualTokens)


class TokenWords(PeftWords[V]):
    """What PEFT says of virtual tokens.

    tasks: PEFT's tasks whose models it gives them to as we do; one_stack: whether tokens of an encoder's and of a decoder's are
    told apart, of which the encoder's are read; read_options: the method's own, of an adapter that is the plain matrix.
    """

    tensor_prefix = EMBEDDINGS
    more_entries = (
        "num_virtual_tokens",
        "num_transformer_submodules",
        "token_dim",
        "num_attention_heads",
        "num_layers",
    )
    tasks: ClassVar[tuple[str, ...]] = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    one_stack: ClassVar[bool] = True
    read_options: ClassVar[Entries] = {}

    def model_entries(self, part: V) -> dict[str, Any]:
        return {
            "target_modules": None,
            "num_virtual_tokens": part.count,
            "token_dim": part.width,
            "num_transformer_submodules": 1,
            "num_attention_heads": part.num_attention_heads,
            "num_layers": part.num_layers,
        }

    def agrees(self, part: V) -> bool:
        """PEFT gives virtual tokens to language models alone; for other heads it has classes of other habits."""
        return part.is_language_model

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        task, stacks = described.get("task_type"), described.get("num_transformer_submodules") or 1
        if task not in self.tasks:
            raise UsageError(f"task_type is {task!r}; accepted for {self.peft_type}: {', '.join(self.tasks)}")
        if stacks != 1 and self.one_stack:
            raise UsageError(
                f"num_transformer_submodules is {stacks}, one of them the decoder's; accepted: 1, the encoder's"
            )
        if set(tensors) != {EMBEDDINGS}:
            raise UsageError(
                f"the adapter of virtual tokens holds {', '.join(tensors) or 'nothing'}; accepted: {EMBEDDINGS}"
            )
        count = int(tensors[EMBEDDINGS].shape[0])
        return FromPeft(whole=tensors, options={"num_virtual_tokens": count, **self.read_options})


def check_side(what: str, wanted: int | None, found: int) -> None:
    """Raises UsageError for a model of another size than the adapter's; None: the adapter does not say."""
    if wanted is not None and wanted != found:
        raise UsageError(
            f"the adapter is for a {what} of {wanted}, but this model's is {found}: it belongs to another base model"
        )


def linear_parameters(
    out_features: int, in_features: int, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias as torch's own linear layers begin: uniform within 1/√in."""
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight), nn.Parameter(bias)
