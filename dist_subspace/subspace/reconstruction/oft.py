"""OFT, orthogonal fine-tuning in its input-centric form (OFTv2, arXiv 2506.19847): `y = W (R x)`, R block-diagonal, a rotation.

Of each block of b inputs, `Rᵀ = (I + Q)(I - Q)⁻¹` (Cayley) of a skew-symmetric Q, whose entries above the diagonal are trained:
zero at the start. The inverse is a Neumann series that ends with Q^(k-1), k = `neumann_terms`:

    Rᵀ = I + 2 Q + 2 Q² + … + 2 Q^(k-2) + Q^(k-1)

so that R is a rotation but for terms of Q^(k-1). With `cayley: exact` the inverse is solved, and as in PEFT the rotation is the
opposite one, `Rᵀ = (I - Q)(I + Q)⁻¹`. What is computed is `x + (Rᵀ - I)ᵀ x`: exactly x at the start, and nothing is lost
in 16 bits. With `block_share` all blocks are one. A layer whose inputs b does not divide takes the divisor next to b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.options import choice, flag, whole
from dist_subspace.subspace.blocks.deviation import wide
from dist_subspace.subspace.blocks.spectral import turned
from dist_subspace.subspace.core.forms import RotationForm
from dist_subspace.subspace.core.learning_rate import LearningRate
from dist_subspace.subspace.core.peft_words import Entries, FromPeft, PeftWords, Shapes
from dist_subspace.subspace.core.registry import register, register_peft
from dist_subspace.subspace.core.spec import MethodInfo, Settings


@register(
    MethodInfo(
        name="oft",
        category="reconstruction, mode 2",
        reference="2506.19847",
        summary="the inputs of the frozen matrix rotated, block by block: W R",
        learning_rate=LearningRate(3e-3, 2e-3, 4e-4, "twice LoRA's"),
        options={
            "oft_block_size": whole(32, "b, inputs a block; of a layer's inputs the divisor next to it", least=2),
            "block_share": flag(False, "one rotation for all blocks"),
            "cayley": choice("neumann", "Cayley's inverse: as a series, or solved", "exact"),
            "neumann_terms": whole(5, "k, terms of the series (3 is taken for 4, as PEFT does)", least=2),
        },
        count="d_in (b - 1) / 2, or b (b - 1) / 2 of one shared block",
    )
)
class Oft(RotationForm):
    @classmethod
    def check_site(cls, site: Any, settings: Settings, known: bool) -> None:
        if divisor_near(settings.options["oft_block_size"], site.in_features) == 1:
            raise UsageError(
                f"subspace.options.oft_block_size is {settings.options['oft_block_size']}, but a target has "
                f"{site.in_features} inputs, and no divisor of them but 1 is near it; accepted: a size near a divisor, or "
                "such layers left out by subspace.exclude_modules"
            )

    def create(self, settings: Settings, generator: torch.Generator) -> None:
        self.block = divisor_near(settings.options["oft_block_size"], self.in_features)
        self.blocks = self.in_features // self.block
        rows = 1 if settings.options["block_share"] else self.blocks
        self.oft_R = nn.Parameter(torch.zeros(rows, self.block * (self.block - 1) // 2))

    def rotation(self) -> Tensor:
        """`Rᵀ - I`, its blocks `(d_in / b, b, b)`, in at least float32."""
        return self.turn().expand(self.blocks, -1, -1)

    def turn(self) -> Tensor:
        """The same; one block stands for all where they are shared."""
        above = wide(self.oft_R)
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=above.device)
        upper = above.new_zeros(len(above), self.block, self.block)
        upper[:, rows, columns] = above
        skew = upper - upper.mT
        if self.settings.options["cayley"] == "exact":
            return turned(skew)
        with torch.autocast(skew.device.type, enabled=False):
            return neumann(skew, self.settings.options["neumann_terms"])

    def transform(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.blocks, self.block))
        turn = self.turn().to(x.dtype)
        moved = blocks @ turn[0] if len(turn) == 1 else torch.einsum("...nk,nkc->...nc", blocks, turn)
        return self.base(x + moved.flatten(-2).to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """`W R`."""
        blocks = weight.unflatten(1, (self.blocks, self.block))
        return weight + torch.einsum("onc,nkc->onk", blocks, self.rotation().to(weight.device)).flatten(1)

    def file_tensors(self) -> dict[str, Tensor]:
        return {"oft_R.weight": self.oft_R.detach()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.oft_R.data.copy_(tensors["oft_R.weight"])


def neumann(skew: Tensor, terms: int) -> Tensor:
    """`(I + Q)(I + Q + … + Q^(k-2)) - I = 2 Q + … + 2 Q^(k-2) + Q^(k-1)` for `Q (..., b, b)` and k terms; PEFT's with two is
    2 Q, and with three that of four."""
    if terms == 2:
        return 2 * skew
    power = skew
    total = 2 * skew
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def divisor_near(size: int, inputs: int) -> int:
    """The divisor of `inputs` next to `size`, the smaller one of two: PEFT's rule, which a file does not tell otherwise."""
    divisors = [n for n in range(1, inputs + 1) if inputs % n == 0]
    return min(divisors, key=lambda n: (abs(n - size), n))


@register_peft(Oft)
class OftWords(PeftWords[Oft]):
    peft_type = "OFT"
    on_conv1d = False
    tensor_prefix = "oft_"
    suffixes: ClassVar[Mapping[str, str]] = {"oft_R.weight": "oft_R.weight"}
    defaults: ClassVar[Entries] = {
        **{"r": 0, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "bias": "none"},
    }
    more_entries = ("oft_block_size",)
    without_effect = ("init_weights", "module_dropout", "eps")  # dropout is of convolutions, eps of coft

    def entries(self, settings: Settings) -> dict[str, Any]:
        options = settings.options
        return {
            "r": 0,
            "oft_block_size": options["oft_block_size"],
            "block_share": options["block_share"],
            "use_cayley_neumann": options["cayley"] == "neumann",
            "num_cayley_neumann_terms": options["neumann_terms"],
            "coft": False,
            "bias": "none",
        }

    def read(self, described: Entries, tensors: dict[str, Tensor]) -> FromPeft:
        layers = self.by_layer(tensors)
        if "oft_block_size" not in described:
            raise UsageError(
                "oft_block_size is not said: the adapter is of a PEFT whose OFT was another one (before 0.14)"
            )
        sizes = {name: _block_size(held["oft_R.weight"]) for name, held in layers.items()}
        different = sorted(set(sizes.values()))
        if described.get("r") and len(different) > 1:
            raise UsageError(
                f"r is {described['r']}, so many blocks in each layer, which makes blocks of {different} inputs; accepted: r: 0 "
                "with an oft_block_size, or layers with as many inputs"
            )
        shared = bool(described["block_share"])
        rows = {name: held["oft_R.weight"].shape[0] for name, held in layers.items()}
        shapes: Shapes = {name: (None, None if shared else rows[name] * size) for name, size in sizes.items()}
        options = {
            "oft_block_size": different[0] if described.get("r") else int(described["oft_block_size"]),
            "block_share": shared,
            "cayley": "neumann" if described["use_cayley_neumann"] else "exact",
            "neumann_terms": int(described["num_cayley_neumann_terms"]),
        }
        return FromPeft(layers, shapes=shapes, options=options)


def _block_size(above: Tensor) -> int:
    """b of `(blocks, b (b - 1) / 2)`."""
    return (1 + math.isqrt(1 + 8 * above.shape[1])) // 2
