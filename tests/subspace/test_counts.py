"""How much each method trains: docs/methods.md, "Published counts", the fixture's counts, and every method's formula.

Models have no values (meta device), and few blocks: what a block adds is multiplied.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dist_subspace import SubspaceConfig, methods
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import adopt_all
from dist_subspace.subspace import attach_method, trainable_parameters
from tests.subspace.golden import config_of, layer
from tests.tiny_models import tiny_model

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
# The pretrained one's configuration, as far as it decides about parameters: it norms its relative positions' embeddings.
DEBERTA_V3 = {
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_buckets": 256,
} | {
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}
Build = Callable[[int], nn.Module]


def roberta(**sizes: Any) -> Build:
    return lambda layers: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(num_hidden_layers=layers, **sizes)
    )


def deberta(layers: int) -> nn.Module:
    config = transformers.DebertaV2Config(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, **DEBERTA_V3
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def llama(layers: int, **sizes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **sizes))


def llama_7b(layers: int) -> nn.Module:
    return llama(layers, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)


def llama3_8b(layers: int) -> nn.Module:
    return llama(layers, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)


@functools.cache
def skeleton(build: Build, layers: int) -> nn.Module:
    with torch.device("meta"):
        model = build(layers)
    adopt_all(model)
    return model


def trained(build: Build, layers: int, method: str, **config: Any) -> int:
    model = copy.deepcopy(skeleton(build, layers))
    attach_method(model, SubspaceConfig(method=method, **config), gathered)
    return sum(p.numel() for p in trainable_parameters(model))


def count(build: Build, layers: int, method: str, **config: Any) -> int:
    """Of a model with so many blocks, from two that have one and two."""
    one, two = (trained(build, n, method, **config) for n in (1, 2))
    return one + (layers - 1) * (two - one)


# Backbone: blocks, parameters in millions, how far a printed ‰ may lie from the exact one.
BACKBONES: dict[str, tuple[Build, int, int, float]] = {
    "roberta-base": (roberta(), 12, 125, 0.03),
    "deberta-v3-base": (deberta, 12, 184, 0.12),
    "roberta-large": (roberta(**LARGE), 24, 355, 0.03),
}
RANKS = (2, 4, 8, 16)


def published() -> dict[str, tuple[str, dict[str, Any], tuple[int, int, int], tuple[float, float, float]]]:
    """Row -> method, configuration, exact counts and printed ‰ on the three backbones."""
    rows: dict[str, Any] = {
        "SAM-PARSER": ("sam-parser", {}, (55_296, 55_296, 147_456), (0.44, 0.30, 0.42)),
        "(IA)3": ("ia3", {}, (55_296, 55_296, 147_456), (0.44, 0.30, 0.42)),
        "SSL": ("ssl", {}, (27_648, 27_648, 73_728), (0.22, 0.15, 0.21)),
        "SSB": ("ssb", {}, (82_944, 82_944, 221_184), (0.66, 0.45, 0.62)),
        "BitFit": ("bitfit", {}, (102_144, 102_912, 271_360), (0.82, 0.54, 0.76)),
    }
    lora = ((2.65, 1.79, 2.49), (5.31, 3.61, 4.98), (10.62, 7.23, 9.97), (21.24, 14.43, 19.94))
    flora = ((2.65, 1.79, 2.49), (5.31, 3.61, 4.99), (10.64, 7.24, 9.98), (21.38, 14.52, 20.04))  # last: printed 19.98
    dora = ((3.32, 2.23, 3.12), (5.97, 4.06, 5.61), (11.28, 7.66, 10.59), (21.90, 14.87, 20.56))
    houlsby = ((2.50, 1.68, 2.35), (4.87, 3.32, 4.57), (9.59, 6.63, 9.00), (19.03, 12.93, 17.87))
    pfeiffer = ((2.43, 1.63, 2.29), (4.80, 3.26, 4.50), (9.52, 6.41, 8.93), (18.96, 12.88, 17.80))
    for i, r in enumerate(RANKS):
        base, large, rank = 165_888 * r, 442_368 * r, {"rank": r}
        plain = (base, base, large)
        rows |= {
            f"LoRA r={r}": ("lora", rank, plain, lora[i]),
            f"PA r={r}": ("parallel-adapter", rank, plain, lora[i]),
            f"LoRA+MPC_o r={r}": ("lora", {**rank, "constraint": "mpc_o"}, plain, lora[i]),
            f"LoRA+MPC_d r={r}": ("lora", {**rank, "constraint": "mpc_d"}, plain, lora[i]),
            f"LoRA+MPC_n r={r}": ("lora", {**rank, "constraint": "mpc_n"}, plain, lora[i]),
            f"TriLoRA r={r}": ("trilora", rank, (base + 72 * r, base + 72 * r, large + 144 * r), lora[i]),
            f"AdaLoRA r={r}": (
                "adalora",
                {**rank, "options": {"init_rank": r}},
                (base + 72 * r, base + 72 * r, large + 144 * r),
                lora[i],
            ),
            f"FLoRA r={r}": ("flora", rank, (base + 72 * r * r, base + 72 * r * r, large + 144 * r * r), flora[i]),
            f"DoRA r={r}": ("dora", rank, (base + 82_944, base + 82_944, large + 221_184), dora[i]),
            f"Houlsby c={4 * r}": ("houlsby", {"rank": 4 * r}, _adapters(2, 4 * r), houlsby[i]),
            f"Pfeiffer c={8 * r}": ("pfeiffer", {"rank": 8 * r}, _adapters(1, 8 * r), pfeiffer[i]),
        }
    return rows


def _adapters(a_block: int, c: int) -> tuple[int, int, int]:
    base, large = (layers * a_block * ((2 * d + 1) * c + d) for layers, d in ((12, 768), (24, 1024)))
    return base, base, large


PUBLISHED = published()


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_as_much_is_trained_as_was_published(row: str, backbone: str) -> None:
    method, config, exact, printed = PUBLISHED[row]
    build, layers, millions, tolerance = BACKBONES[backbone]
    column = list(BACKBONES).index(backbone)
    found = count(build, layers, method, **config)
    assert found == exact[column]
    assert found / millions / 1e3 == pytest.approx(printed[column], abs=tolerance)


def test_the_ends_of_the_adapters_rows_are_the_integers_of_the_table() -> None:
    assert (_adapters(2, 8)[0], _adapters(2, 64)[0]) == (313_536, 2_379_264)
    assert (_adapters(2, 8)[2], _adapters(2, 64)[2]) == (835_968, 6_343_680)
    assert (_adapters(1, 16)[0], _adapters(1, 128)[0]) == (304_320, 2_370_048)
    assert (_adapters(1, 16)[2], _adapters(1, 128)[2]) == (811_392, 6_319_104)


@pytest.mark.parametrize(("method", "expected"), [("bitfit", 102_144), ("ssl", 27_648), ("ssb", 82_944)])
def test_a_model_with_all_its_blocks_has_the_same_count(method: str, expected: int) -> None:
    build, layers, _, _ = BACKBONES["roberta-base"]
    assert trained(build, layers, method) == expected


# LLaMA, with query, key, value, FFN-up and FFN-down as targets: the authors' README, and every method's own formula.

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SIZES = {"llama-7b": (llama_7b, 4096, 11008, 4096), "llama3-8b": (llama3_8b, 4096, 14336, 1024)}
LORA_7B, LORA_8B = 56_098_816, 28_311_552
README = [
    ("llama-7b", "lora", 32, LORA_7B),
    ("llama-7b", "dora", 32, LORA_7B + 876_544),
    ("llama-7b", "flora", 32, LORA_7B + 163_840),
    ("llama-7b", "adalora", 32, LORA_7B + 5_120),
    ("llama-7b", "lora-dash", 32, LORA_7B + 1_280),
    ("llama3-8b", "lora", 16, LORA_8B),
    ("llama3-8b", "dora", 16, LORA_8B + 786_432),
    ("llama3-8b", "flora", 16, LORA_8B + 40_960),
    ("llama3-8b", "lora-dash", 16, LORA_8B + 1_280),
]


@pytest.mark.parametrize(("size", "method", "rank", "expected"), README)
def test_llama_trains_as_much_as_the_authors_count(size: str, method: str, rank: int, expected: int) -> None:
    assert count(SIZES[size][0], 32, method, target_modules=TARGETS, **config_of(method, rank)) == expected


# (d_out, d_in, r) -> trained values of a layer.
Formula = Callable[[int, int, int], int]
PAIR: Formula = lambda o, i, r: r * (o + i)  # noqa: E731
A_LAYER: dict[str, Formula] = {
    **dict.fromkeys(("lora", "rslora", "pissa", "milora", "olora", "liera", "parallel-adapter"), PAIR),
    "spectral-additive": PAIR,
    **dict.fromkeys(("lora-fa", "miss"), lambda o, i, r: r * o),
    "dora": lambda o, i, r: r * (o + i) + o,
    **dict.fromkeys(("trilora", "adalora"), lambda o, i, r: r * (o + i) + r),
    "flexlora": lambda o, i, r: 2 * r * (o + i) + 2 * r,  # rows for twice the starting rank are allocated
    **dict.fromkeys(("flora", "moslora"), lambda o, i, r: r * (o + i) + r * r),
    "spectral-rotational": lambda o, i, r: 2 * r * r,
    "lora-xs": lambda o, i, r: r * r,
    "lora-dash": lambda o, i, r: r * (o + i) + min(8, o, i),
    "ssl": lambda o, i, r: i,
    "oft": lambda o, i, r: i // 32 * (32 * 31 // 2),
    "ia3": lambda o, i, r: o,
    "ssb": lambda o, i, r: o + i,
    "bitfit": lambda o, i, r: o,
    **dict.fromkeys(("sam-parser", "svdiff"), lambda o, i, r: min(o, i)),
    **dict.fromkeys(("houlsby", "pfeiffer"), lambda o, i, r: (2 * o + 1) * r + o),
    "vera": lambda o, i, r: r + o,
}
# (d, d_kv, layers) -> trained values of a model, with 20 virtual tokens.
A_MODEL: dict[str, Formula] = {
    "prompt": lambda d, kv, n: 20 * d,
    "prefix": lambda d, kv, n: 20 * n * 2 * kv,
    "p-tuning": lambda d, kv, n: 20 * d + 3 * (d * d + d),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_trains_what_its_formula_says(method: str, size: str) -> None:
    build, d, f, kv = SIZES[size]
    if method in A_MODEL:
        assert count(build, 32, method) == A_MODEL[method](d, kv, 32)
        return
    formula, rank = A_LAYER[method], 8
    shapes = [(d, d), (kv, d), (kv, d), (f, d), (d, f)]
    expected = 32 * sum(formula(o, i, rank) for o, i in shapes)
    assert count(build, 32, method, target_modules=TARGETS, **config_of(method, rank)) == expected


# The fixture: d_out = 3, d_in = 4, r = 2.

FIXTURE = {"sam-parser": 3, "svdiff": 3, "ia3": 3, "ssl": 4, "ssb": 7, "bitfit": 3} | {
    **dict.fromkeys(("lora", "pissa", "milora", "liera", "parallel-adapter", "spectral-additive"), 14),
    **dict.fromkeys(("adalora", "trilora"), 16),
    **dict.fromkeys(("flora", "moslora"), 18),
    "dora": 17,
    "spectral-rotational": 8,
    "lora-xs": 4,
    "miss": 6,
    "oft": 6,
    "lora-dash": 17,
    "vera": 5,
}


@pytest.mark.parametrize("method", FIXTURE)
def test_the_fixtures_layer_trains_the_golden_number(method: str) -> None:
    module = layer(method, **config_of(method, 2))
    assert sum(p.numel() for p in module.trainables().values()) == FIXTURE[method]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("prefix", {}, 160),
        ("prefix", {"projection": True, "projection_dim": 6}, 318),
        ("p-tuning", {"encoder": "mlp", "hidden": 6}, 192),
        ("p-tuning", {"encoder": "lstm", "hidden": 6}, 2_028),
    ],
)
def test_virtual_tokens_train_the_golden_numbers(method: str, options: dict[str, Any], expected: int) -> None:
    model = tiny_model(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    adopt_all(model)
    attach_method(model, SubspaceConfig(method, options={"num_virtual_tokens": 5, **options}), gathered)
    assert sum(p.numel() for p in trainable_parameters(model)) == expected
