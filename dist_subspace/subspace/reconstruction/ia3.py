"""(IA)³ (arXiv 2205.05638): `y = l ⊙ (W x) + b`, each output feature scaled.

`l (d_out)` one at the start, held as a deviation. The published code and PEFT scale the bias too (`scale_bias`). Layers named by
`input_scaled_modules` scale their input instead, `y = W (l ⊙ x) + b` with `l (d_in)`: PEFT's `feedforward_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.names import ends_with
from dist_subspace.families.projections import KEY_VALUE_UP
from dist_subspace.options import flag, name_list
from dist_subspace.subspace.blocks.scaling import Scale, ScalingLinear
from dist_subspace.subspace.core.bias import ScalesBias
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.shared import SharedAcrossLayers
from dist_subspace.subspace.core.spec import EXPERT_PARAMETERS, MethodInfo, Settings


@register(
    MethodInfo(
        name="ia3",
        category="reconstruction, mode 2",
        reference="2205.05638",
        summary="each output feature scaled: diag(l) W",
        learning_rate=LearningRate(1e-1, 5e-2, 3e-3, "T0-3B in the method's repository"),
        targets=KEY_VALUE_UP,
        options={
            "scale_bias": flag(False, "scale the bias by l too, as PEFT does"),
            "input_scaled_modules": name_list("targets that scale their input instead (PEFT's feedforward_modules)"),
        },
        count="d_out",
        on_experts=EXPERT_PARAMETERS,
    )
)
class Ia3(ScalingLinear, ScalesBias, SharedAcrossLayers):
    @classmethod
    def make_shared(cls, sites: Mapping[str, nn.Module], settings: Settings) -> frozenset[nn.Module]:
        """The sites that scale their input."""
        scaling_input: set[nn.Module] = set()
        for ending in settings.options["input_scaled_modules"]:
            named = {site for name, site in sites.items() if ends_with(name, ending)}
            if not named:
                raise UsageError(
                    f"subspace.options.input_scaled_modules has {ending!r}, which names no target; targets here are for "
                    f"example: {', '.join(list(sites)[:4])}"
                )
            scaling_input |= named
        return frozenset(scaling_input)

    def take_shared(self, shared: frozenset[nn.Module] | None) -> None:
        self.scales_input = self.base in (shared or ())

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.ia3_l = nn.Parameter(torch.zeros(self.in_features if self.scales_input else self.out_features))

    def transform(self, x: Tensor) -> Tensor:
        if self.scales_input:
            return self.base(Scale.apply(x, self.ia3_l))
        return Scale.apply(self.base(x), self.ia3_l)

    def scaled_bias(self, bias: Tensor) -> Tensor:
        scaled = self.settings.options["scale_bias"] and not self.scales_input
        return bias * (1 + self.ia3_l) if scaled else bias

    def merged(self, weight: Tensor) -> Tensor:
        factor = 1 + self.ia3_l.float().to(weight.device)
        return weight * factor if self.scales_input else factor[:, None] * weight

    def file_tensors(self) -> dict[str, Tensor]:
        factor = super().file_tensors()["ia3_l"]
        return {"ia3_l": factor[None, :] if self.scales_input else factor[:, None]}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors({"ia3_l": tensors["ia3_l"].flatten()})

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None]:
        factor = 1 + self.ia3_l.detach().float()
        return (factor, None) if self.scales_input else (None, factor)


@register_peft(Ia3)
class Ia3Words(PeftWords[Ia3]):
    peft_type = "IA3"
    tensor_prefix = "ia3_"
    suffixes: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}
    more_entries = ("feedforward_modules",)
    without_effect = ("init_ia3_weights",)
    module_lists = ("feedforward_modules",)

    def entries(self, settings: Settings) -> dict[str, Any]:
        """PEFT takes a list as endings of any text, so that `wo` would mean `two` as well: a pattern says it exactly."""
        names = "|".join(map(re.escape, settings.options["input_scaled_modules"]))
        return {"feedforward_modules": rf"(.*\.)?({names})" if names else []}

    def agrees(self, part: Ia3) -> bool:
        return part.bias is None or part.scales_input or bool(part.settings.options["scale_bias"])

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        layers = self.by_layer(tensors)
        feedforward = described.get("feedforward_modules")
        inputs = [name for name, held in layers.items() if _scales_input(name, held["ia3_l"], feedforward)]
        shapes: Shapes = {}
        for name, held in layers.items():
            size = held["ia3_l"].numel()
            if held["ia3_l"].shape != ((1, size) if name in inputs else (size, 1)):
                raise UsageError(
                    f"the adapter holds {name}.ia3_l as {list(held['ia3_l'].shape)}, which feedforward_modules contradicts"
                )
            shapes[name] = (None, size) if name in inputs else (size, None)
        return FromPeft(layers, shapes=shapes, options={"scale_bias": True, "input_scaled_modules": inputs})


def _scales_input(name: str, scales: Tensor, feedforward: str | Iterable[str] | None) -> bool:
    """As PEFT decides it: a whole pattern, or any text that the name ends in; without either PEFT knows the family, and the
    tensor's shape says the same."""
    if feedforward is None:
        return scales.shape[0] == 1
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, name) is not None
    return name.endswith(tuple(feedforward))
