"""A block that a forward uses several times is no ZeRO-3 leaf, and trains as it does without DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, load_frozen, trainable_parameters
from dist_subspace.families.blocks import block_lists
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.leaf_blocks import mark_leaf_blocks
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.deepspeed.reuse import called_once
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import named_trainables
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd, tiny_config


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.checkpoint, self.rounds = False, 2


class Once(Stack):
    def forward(self, x: Tensor, early: bool = False) -> Tensor:
        if early:
            for layer in self.layers:
                x = layer(x)
            return x
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(layer.__call__, x, use_reentrant=False)
            else:
                x = layer(x) + number * len(self.layers)
            x = norm(x)
        return x


class OnceByNumber(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.layers)):
            x = self.norms[i](self.layers[i](x))
        return x


class OnceInAMethod(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        return x


class ByRounds(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return x


class ByOneLayer(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            x = self.layers[i // 2](x)
        return x


class TwiceInTheLoop(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(layer(x))
        return x


class TwoLoops(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class HandedOn(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x


class HandedOnAndCalled(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
        return x


class MoreLayersThanBlocks(Once):
    """As its configuration says; whoever uses them again does so out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_config("LlamaConfig", num_hidden_layers=6)


class ByRepeats(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for _ in range(self.rounds):
                x = layer(x)
        return x


class Shared(Once):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = Once()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.tower(x) @ self.tower(other).mT


class OneTower(TwoTowers):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.tower(x) if other is None else self.tower(other)


@pytest.mark.parametrize("kind", [Once, OnceByNumber, OnceInAMethod, OneTower, HandedOn])
def test_a_stack_that_is_walked_once_is_found(kind: type[nn.Module]) -> None:
    model = kind()
    assert called_once(model, next(name for name in block_lists(model) if name.endswith("layers")))
    assert mark_leaf_blocks(model)[-1] == "Linear"


@pytest.mark.parametrize(
    "kind",
    [
        *(ByRounds, ByOneLayer, TwiceInTheLoop, TwoLoops, ByRepeats, Shared, TwoTowers),
        *(HandedOnAndCalled, MoreLayersThanBlocks),
    ],
)
def test_a_stack_that_is_used_again_is_found(kind: type[nn.Module]) -> None:
    model = kind()
    assert not called_once(model, next(name for name in block_lists(model) if name.endswith("layers")))
    assert "Linear" not in mark_leaf_blocks(model)


FAMILIES = {
    **dict.fromkeys(
        ("Llama", "Mistral", "Qwen2Moe", "Gemma2", "GPT2", "GPTNeoX", "Bloom", "OPT", "Mamba"), ("CausalLM", True)
    ),
    **dict.fromkeys(("Bert", "DistilBert", "DebertaV2"), ("MaskedLM", True)),
    **dict.fromkeys(("T5", "Bart"), ("Seq2SeqLM", True)),
    "Albert": ("MaskedLM", False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_transformers_are_leaves_but_alberts(name: str) -> None:
    auto, once = FAMILIES[name]
    with init_empty_weights(include_buffers=False):
        config = tiny_config(f"{name}Config")
        model = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    assert all(called_once(model, name) == once for name in block_lists(model))


# Trained.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    sizes = {"vocab_size": tiny.VOCABULARY, "num_hidden_layers": 4, "num_hidden_groups": 2}
    albert = transformers.AlbertForMaskedLM(tiny_config("AlbertConfig", **sizes))
    made = {"albert": str(tmp_path_factory.mktemp("albert"))}
    albert.save_pretrained(made["albert"])
    return made | {"llama": save_odd(tmp_path_factory.mktemp("llama"), "llama", layers=3)}


def attached_model(folders: dict[str, str], kind: str, deepspeed: dict[str, Any] | None) -> Any:
    """ALBERT's two groups, each used twice; or a LLaMA whose first block is its last one too."""
    task = "masked-lm" if kind == "albert" else "causal-lm"
    model: Any = load_frozen(folders[kind], storage="fp32", task=task, deepspeed=deepspeed)
    if kind == "llama":
        model.model.layers[2] = model.model.layers[0]
        for layer in model.model.layers:
            layer._z3_leaf = False  # marked while it was used once
    return attach(model, SubspaceConfig(rank=2)).train()


def gradients_of(folders: dict[str, str], kind: str, checkpointing: str, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collective: of a step's global batch under ZeRO-3; the second step follows the order of modules that the first one had."""
    from deepspeed.utils import safe_get_full_grad

    from dist_subspace.placement.deepspeed.shards import rewritten

    ensure_process_group()
    rank, size = world().rank, world().size
    model = attached_model(folders, kind, tiny.ds_config(3, world_size=size))
    for name, parameter in named_trainables(model).items():
        with rewritten([parameter]):
            parameter.data.copy_(start[name])
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=trained, world_size=size))
    engine.train()
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    found: dict[str, Tensor] = {}
    for _ in range(2):
        ids = tiny.own_batch(0, rank, size)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        found = {name: safe_get_full_grad(p).clone() for name, p in named_trainables(engine.module).items()}
        engine.step()
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("albert", "off"), ("llama", "off"), ("llama", "non-reentrant")],
)
def test_a_block_that_is_used_again_has_the_gradients_of_one_process(
    folders: dict[str, str], kind: str, checkpointing: str
) -> None:
    model = attached_model(folders, kind, None)
    start = {name: torch.randn_like(p) * 0.2 for name, p in named_trainables(model).items()}
    for name, parameter in named_trainables(model).items():
        parameter.data.copy_(start[name])
    ids = tiny.global_batch(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in named_trainables(model).items()}
    for gradients in run_on_ranks(2, gradients_of, folders, kind, checkpointing, start):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
