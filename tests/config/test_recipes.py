"""Every recipe for real models is what its header says: read, built on the meta device in its real size, its targets matched, its
method put on, its JSON taken by DeepSpeed's own class, and its numbers recomputed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_subspace.config import Config, load_config
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.deepspeed.shards import gathered
from dist_subspace.storage import FrozenLinear, adopt_all
from dist_subspace.subspace import SubspaceConfig, attach_method, trainable_parameters
from tests.ranks import ROOT

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("quickstart"))
# Shapes of models, as their config.json on the Hub has them.
COMMON = {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
SHAPES = {
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
        **COMMON,
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        **COMMON, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        **COMMON, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
    ),
}
SSL = (("method", "ssl"),)
RANKS = {"one GPU": 1, "2 GPUs": 2, "8 GPUs": 8}
BLOCK, GROUP = 64, 256  # NF4: weights of an absmax, absmax values of a second-level one


@dataclass(frozen=True)
class Sizes:
    packed: int  # weights of the layers that are held in 4 bits
    others: int  # embeddings, head and norms
    trained: int


@functools.cache
def sizes(model: str, subspace: tuple[tuple[str, object], ...]) -> Sizes:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(SHAPES[model], dtype=torch.bfloat16)
    adopt_all(built)
    head = built.get_output_embeddings()
    packed = {module for module in built.modules() if isinstance(module, FrozenLinear) and module is not head}
    weights = sum(weight.numel() for module in packed for weight in module.parameters())
    every = sum(weight.numel() for weight in built.parameters())
    attach_method(built, SubspaceConfig(**dict(subspace)), gathered)  # type: ignore[arg-type]
    return Sizes(weights, every - weights, sum(weight.numel() for weight in trainable_parameters(built)))


def of(config: Config) -> Sizes:
    asked = config.subspace
    names = ("method", "rank", "alpha", "target_modules")
    return sizes(config.model.path, tuple((name, getattr(asked, name)) for name in names))


def header(path: Path) -> dict[str, str]:
    lines = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return dict(line.split(": ", 1) for line in lines)


def ranks_of(path: Path) -> int:
    return next(ranks for words, ranks in RANKS.items() if words in header(path)["Hardware"])


def numbers(path: Path) -> tuple[str, str]:
    """The header's two lines of numbers, computed."""
    config, ranks = load_config(path), ranks_of(path)
    size, stage = of(config), PRESETS[config.deepspeed.preset]
    absmax = size.packed / BLOCK
    held = size.packed / 2 + absmax + 4 * absmax / GROUP + 2 * size.others
    adapter = 4 * size.trained + 12 * size.trained / (ranks if stage else 1)
    tokens = config.training.global_batch_size * config.data.max_length  # type: ignore[operator]
    weights = held / (ranks if stage == 3 else 1) / 2**30
    return f"{tokens:,}", f"{weights:.1f} GiB weights, {adapter / 2**20:.0f} MiB adapter and its optimizer state"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_header_is_what_its_model_and_its_method_give(path: Path) -> None:
    said = header(path)
    assert (said["Tokens a step"], said["Bytes a rank"]) == numbers(path)
    assert str(path.relative_to(ROOT)) in said["Start"]
    assert load_config(path).run.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_deepspeed_takes_a_recipes_preset(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config, ranks = load_config(path), ranks_of(path)
    batch, micro = config.training.global_batch_size, config.training.per_device_train_batch_size
    assert batch is not None and batch % (micro * ranks) == 0
    made = deepspeed_config(
        config.deepspeed.preset,
        micro_batch=micro,
        rounds=batch // (micro * ranks),
        world_size=ranks,
        trainable_numel=of(config).trained,
        max_grad_norm=config.training.max_grad_norm,
    )
    assert DeepSpeedZeroConfig(**made["zero_optimization"]).stage == PRESETS[config.deepspeed.preset]


def test_the_real_sizes_are_those_of_the_models() -> None:
    billions = [round((size.packed + size.others) / 1e9, 2) for size in (sizes(model, SSL) for model in SHAPES)]
    assert billions == [1.24, 8.03, 70.55]
