"""BitFit (arXiv 2106.10199): only biases are trained, `y = W x + b'`, of linear layers and of norms.

`b' = b + δ`, with δ zero at the start and beside the frozen bias. The adapter's file holds δ, which needs no base to be read
back. Where a model has no bias (LLaMA), each targeted linear layer gets a zero one (`biases`: auto).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.norms import is_norm
from dist_subspace.options import choice
from dist_subspace.subspace.blocks.norm_part import NormPart, norm_width
from dist_subspace.subspace.core.bias import AddsBias
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.part import SubspacePart
from dist_subspace.subspace.core.registry import register
from dist_subspace.subspace.core.sites import OwnSites
from dist_subspace.subspace.core.spec import MethodInfo, Settings
from dist_subspace.subspace.core.targets import ALL_LINEAR, Choice, naming


@register(
    MethodInfo(
        name="bitfit",
        category="reconstruction, mode 2",
        reference="2106.10199",
        summary="biases alone, of linear layers and of norms: b + δ",
        learning_rate=LearningRate(3e-2, 1e-2, 3e-4, "T0-3B in (IA)³'s repository"),
        targets="every linear and norm",
        options={
            "biases": choice("auto", "existing ones, or a zero one added to each linear without", "existing", "add")
        },
        count="d_out",
    )
)
class Bitfit(AddsBias, OwnSites):
    @classmethod
    def sites(cls, choice: Choice) -> dict[str, nn.Module]:
        linear, norms = _candidates(choice)
        biases = choice.options["biases"]
        existing = [name for name, m in {**linear, **norms}.items() if getattr(m, "bias", None) is not None]
        if biases == "existing" and not existing:
            raise UsageError(
                "subspace.options.biases is 'existing', but no target has a bias; accepted here: add, auto"
            )
        added = linear if biases == "add" or not existing else {}
        return choice.in_order({*existing, *added})

    @classmethod
    def build(cls, site: nn.Module, settings: Settings, generator: torch.Generator, shared: Any = None) -> SubspacePart:
        if is_norm(site):
            return BitfitNorm(site, settings, norm_width(site), scaled=False, shifted=True)
        return super().build(site, settings, generator, shared)

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.bitfit_b = nn.Parameter(torch.zeros(self.out_features))

    def transform(self, x: Tensor) -> Tensor:
        return self.base(x)

    def added_bias(self) -> Tensor:
        return self.bitfit_b

    def merged(self, weight: Tensor) -> Tensor:
        return weight


class BitfitNorm(NormPart):
    """The bias of a norm: `y = norm(x) + δ`."""

    info = Bitfit.info


def _candidates(choice: Choice) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The linear layers and the norms that are meant: all of them, or those that the user's targets name."""
    if not choice.given:
        return choice.all_linear(), choice.norms()
    if choice.targets == ALL_LINEAR:
        return choice.operators(), {}
    means = naming(choice.targets)
    norms = {name: norm for name, norm in choice.norms().items() if means(name)}
    return choice.operators(beside=norms), norms
