"""Where training starts: each tensor has the distribution that the method's paper, or PEFT, draws it from.

On layers whose sides and rank all differ, so that one fan taken for another shows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach
from dist_subspace.storage import pack
from dist_subspace.subspace import resolve
from tests.tiny_models import tiny_model

D_OUT, D_IN, RANK = 96, 160, 24
ZERO = ("constant", 0.0)


def kaiming(fan: int) -> tuple[str, float]:
    """What `torch.nn.Linear` draws its weight from: Kaiming-uniform with a = √5."""
    weight = torch.empty(2000, fan)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    return "uniform", float(weight.std()) * math.sqrt(3)


def normal(std: float) -> tuple[str, float]:
    return "normal", std


A, UNIFORM_B, MIXER = kaiming(D_IN), kaiming(RANK), kaiming(RANK)
LORA = {"lora_A": A, "lora_B": ZERO}
TRIPLETS = {"lora_A": normal(0.02), "lora_B": normal(0.02), "lora_E": ZERO}
BOTTLENECK = {"adapter_down": kaiming(D_OUT), "adapter_down_bias": ZERO, "adapter_up": ZERO, "adapter_up_bias": ZERO}
LAYERS: list[tuple[str, dict[str, Any], dict[str, tuple[str, float]]]] = [
    *((method, {}, LORA) for method in ("lora", "rslora", "liera", "parallel-adapter")),
    *((method, {"init": "gaussian"}, {"lora_A": normal(1 / RANK), "lora_B": ZERO}) for method in ("lora", "rslora")),
    ("dora", {}, {**LORA, "lora_magnitude_vector": ZERO}),
    ("lora-dash", {}, {**LORA, "dash_delta": ZERO}),
    ("lora-fa", {}, {"lora_A.matrix": A, "lora_B": ZERO}),
    ("trilora", {}, {"lora_A": A, "lora_B": UNIFORM_B, "lora_E": ZERO}),
    ("flora", {}, {"lora_A": A, "lora_B": UNIFORM_B, "lora_G": ZERO}),
    ("moslora", {}, {**LORA, "lora_G": MIXER}),
    ("moslora", {"mixer": "orthogonal"}, {**LORA, "lora_G": normal(RANK**-0.5)}),
    ("parallel-adapter", {"learned_scale": True}, {**LORA, "adapter_scale": ZERO}),
    ("adalora", {}, TRIPLETS),
    ("flexlora", {}, TRIPLETS),
    ("houlsby", {}, BOTTLENECK),
    ("pfeiffer", {}, BOTTLENECK),
    (
        "vera",
        {},
        {
            "projections.a": ("uniform", (6 / D_IN) ** 0.5),
            "projections.b": ("uniform", (6 / RANK) ** 0.5),
            "vera_lambda_d": ("constant", 0.1),
            "vera_lambda_b": ZERO,
        },
    ),
    ("ssl", {}, {"ssl_s": ZERO}),
    ("ssb", {}, {"ssb_s": ZERO, "ssb_l": ZERO}),
    ("ia3", {}, {"ia3_l": ZERO}),
    ("bitfit", {}, {"bitfit_b": ZERO}),
    ("sam-parser", {}, {"sam_parser_sigma": ZERO}),
    ("svdiff", {}, {"svdiff_delta": ZERO}),
    ("spectral-additive", {}, {"spectral_P": ZERO, "spectral_Q": ZERO}),
    ("spectral-rotational", {"gain": True}, {"spectral_P": ZERO, "spectral_Q": ZERO, "spectral_gain": ZERO}),
]


def check(name: str, values: Tensor, kind: str, size: float) -> None:
    flat = values.detach().float().flatten()
    if kind == "constant":
        assert torch.equal(flat, torch.full_like(flat, size)), name
        return
    near = max(0.03, 4 * len(flat) ** -0.5)  # of a sample's own spread
    largest, std = float(flat.abs().max()), float(flat.std())
    assert abs(float(flat.mean())) < near * size, name
    if kind == "uniform":
        assert (1 - near) * size < largest <= size * (1 + 0.02), (name, largest, size)
        assert std == pytest.approx(size / math.sqrt(3), rel=near), name
    else:
        assert std == pytest.approx(size, rel=near) and largest > 2 * size, (name, std, size)


@pytest.mark.parametrize(("method", "options", "expected"), LAYERS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_layers_tensors_start_at_their_distributions(
    method: str, options: dict[str, Any], expected: dict[str, tuple[str, float]]
) -> None:
    base = pack(torch.randn(D_OUT, D_IN), "fp32")
    resolved = resolve(SubspaceConfig(method, rank=RANK, options=options))
    part: Any = resolved.method.build(base, resolved.settings, torch.Generator().manual_seed(5), None)
    found = {name: p for name, p in part.named_parameters() if not name.startswith("base.")}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        check(name, values, *expected[name])


WIDTH, MANY = 32, 60  # of the tiny model
ONES = normal(1.0)
TOKENS: list[tuple[str, dict[str, Any], dict[str, tuple[str, float]]]] = [
    ("prompt", {"init": "normal"}, {"prompt_embeddings": normal(0.02)}),
    ("prefix", {}, {"prompt_embeddings": normal(0.02)}),
    ("p-tuning", {"encoder": "none"}, {"prompt_embeddings": ONES}),
    (
        "prefix",
        {"projection": True, "projection_dim": 70},
        {"embedding": ONES, "down": kaiming(WIDTH), "down_bias": kaiming(WIDTH), "up": normal(0.02), "up_bias": ZERO},
    ),
    (
        "p-tuning",
        {"hidden": 70},
        {"embedding": ONES}
        | {f"head_{n}{own}": kaiming(fan) for n, fan in enumerate((WIDTH, 70, 70)) for own in ("", "_bias")},
    ),
    (
        "p-tuning",
        {"encoder": "lstm", "hidden": 70},
        {"embedding": ONES}
        | {f"head_{n}{own}": kaiming(140) for n in (0, 1) for own in ("", "_bias")}
        | {
            f"lstm_{layer}_{way}_{kind}": ("uniform", 70**-0.5)  # torch.nn.LSTM: U(±1/√hidden), biases too
            for layer in (0, 1)
            for way in ("forward", "backward")
            for kind in ("ih", "hh", "ih_bias", "hh_bias")
        },
    ),
]


@pytest.mark.parametrize(("method", "options", "expected"), TOKENS, ids=lambda v: v if isinstance(v, str) else "")
def test_virtual_tokens_and_their_encoders_start_at_their_distributions(
    method: str, options: dict[str, Any], expected: dict[str, tuple[str, float]]
) -> None:
    model = attach(tiny_model(), SubspaceConfig(method, options={"num_virtual_tokens": MANY, **options}))
    found = {n.rpartition(".")[2]: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        check(name, values, *expected[name])
