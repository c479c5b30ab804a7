"""(IA)³ (arXiv 2205.05638): `y = l ⊙ (W x) + b`, each output feature scaled.

`l (d_out)` one at the start, held as a deviation. The published code and PEFT scale the bias too (`scale_bias`). Layers named by
`input_scaled_modules` scale their input instead, `y = W (l ⊙ x) + b` with `l (d_in)`: PEFT's `feedforward_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import flag, name_list
from dist_subspace.subspace.blocks.scaling import Scale, ScalingLinear
from dist_subspace.subspace.core.bias import ScalesBias
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.shared import SharedAcrossLayers
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.core.targets import KEY_VALUE_UP, ends_with


@register(
    MethodInfo(
        name="ia3",
        category="reconstruction, mode 2",
        reference="2205.05638",
        summary="each output feature scaled: diag(l) W",
        targets=KEY_VALUE_UP,
        options={
            "scale_bias": flag(False, "scale the bias by l too, as PEFT does"),
            "input_scaled_modules": name_list("targets that scale their input instead (PEFT's feedforward_modules)"),
        },
        peft_type="IA3",
        count="d_out",
    )
)
class Ia3(ScalingLinear, ScalesBias, SharedAcrossLayers):
    @classmethod
    def make_shared(cls, sites: Mapping[str, nn.Module], settings: Settings) -> frozenset[nn.Module]:
        """The sites that scale their input."""
        found: set[nn.Module] = set()
        for ending in settings.options["input_scaled_modules"]:
            named = {site for name, site in sites.items() if ends_with(name, ending)}
            if not named:
                raise UsageError(
                    f"subspace.options.input_scaled_modules has {ending!r}, which names no target; targets here are for "
                    f"example: {', '.join(list(sites)[:4])}"
                )
            found |= named
        return frozenset(found)

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

    @classmethod
    def peft_config(cls, settings: Settings) -> dict[str, Any]:
        """PEFT takes a list as endings of any text, so that `wo` would mean `two` as well: a pattern says it exactly."""
        names = "|".join(map(re.escape, settings.options["input_scaled_modules"]))
        return {"feedforward_modules": rf"(.*\.)?({names})" if names else []}

    def agrees_with_peft(self) -> bool:
        return self.bias is None or self.scales_input or self.settings.options["scale_bias"]

    def scaling_form(self) -> tuple[Tensor | None, Tensor | None]:
        factor = 1 + self.ia3_l.detach().float()
        return (factor, None) if self.scales_input else (None, factor)
