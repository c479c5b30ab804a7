"""PiSSA against its golden numbers, and against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, resolve
from tests.subspace.golden import BIAS, W, X, layer, settled

TAKEN = torch.tensor(
    [
        [0.4694253848, -0.7056981159, -0.4433966401, 1.4897364712],
        [-0.8297265258, 1.2473472141, 0.7837197681, -2.6331636646],
        [1.0291922809, -1.5472087302, -0.9721255265, 3.2661746176],
    ]
)
GOLDEN = {  # γ: (A0, B0)
    1: ([0.6098981284, -0.9168740636, -0.5760804372, 1.9355312153], [0.7696783495, -1.3604346154, 1.6874822745]),
    2: ([0.4312631024, -0.6483278679, -0.4073503837, 1.3686272476], [0.5442447802, -0.9619725419, 1.1932301594]),
}


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("svd", ["randomized", "exact"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_factors_start_at_the_golden_ones(scale: int, svd: str, transposed: bool) -> None:
    part = layer("pissa", rank=1, alpha=float(scale), options={"svd": svd}, transposed=transposed)
    a, b = GOLDEN[scale]
    torch.testing.assert_close(part.lora_A.data, torch.tensor([a]))
    torch.testing.assert_close(part.lora_B.data, torch.tensor([b]).t())
    assert torch.equal(part.lora_A, part.lora_A0) and torch.equal(part.lora_B, part.lora_B0)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_base_holds_the_golden_residual_in_its_own_layout(transposed: bool) -> None:
    part = layer("pissa", rank=1, options={"residual": "fold"}, transposed=transposed, bias=True)
    torch.testing.assert_close(part.base.dense(), W - TAKEN)
    torch.testing.assert_close(part.base.dense().norm(), torch.tensor(3.1634806189))
    assert part.base.weight.shape == ((4, 3) if transposed else (3, 4))
    torch.testing.assert_close(part(X), X @ W.t() + BIAS)


def test_the_exact_start_is_that_of_the_full_decomposition_where_the_published_shortcut_is_not() -> None:
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double())
    expected = (u[:, :4] * s[:4] @ v[:4]).float()
    errors = {}
    for svd in ("exact", "randomized"):
        resolved = resolve(SubspaceConfig(method="pissa", rank=4, options={"svd": svd}))
        part = settled(resolved.method.build(pack(matrix, "fp32"), resolved.settings, torch.Generator(), None))
        pair = (part.scale * part.lora_B @ part.lora_A).detach()
        errors[svd] = float((pair - expected).norm() / expected.norm())
    assert errors["exact"] < 1e-4 and errors["randomized"] > 100 * errors["exact"]


def test_fourteen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("pissa", rank=2).trainables().values()) == 14


def test_only_the_random_numbers_of_the_given_generator_are_used() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        resolved = resolve(SubspaceConfig(method="pissa", rank=2))
        return settled(resolved.method.build(pack(matrix, "fp32"), resolved.settings, torch.Generator(), None)).lora_A

    assert torch.equal(start(1), start(2))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_it_starts_and_trains_as_pefts(shape: tuple[int, int], residual: str) -> None:
    """PEFT folds the residual into its base; its vectors may have other signs, so its own factors are put into ours."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    theirs[0].weight.data.copy_(matrix)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(theirs, config).base_model.model[0]
    resolved = resolve(SubspaceConfig(method="pissa", rank=3, alpha=6.0, options={"residual": residual}))
    ours = settled(resolved.method.build(pack(matrix, "fp32"), resolved.settings, torch.Generator(), None))
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    torch.testing.assert_close(ours.lora_A.abs(), a.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, b @ a, rtol=1e-4, atol=1e-5)
    if residual == "fold":
        torch.testing.assert_close(ours.base.dense(), wrapped.base_layer.weight.data, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        a.add_(0.1 * torch.randn_like(a))
        b.add_(0.1 * torch.randn_like(b))
        ours.lora_A.copy_(a)
        ours.lora_B.copy_(b)
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(ours(x), wrapped(x), rtol=1e-4, atol=1e-5)
