"""Layers whose weight a model reads are found in its source, in every form of a read; questions do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional

from dist_subspace.storage import FrozenLinear, adopt_all, left_alone
from tests.tiny_models import tiny_config


class Layers(nn.Module):
    """Two layers and a stack of two pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"read": nn.Linear(4, 4)})
        self.stack = nn.ModuleList(
            nn.ModuleDict({"read": nn.Linear(4, 4), "called": nn.Linear(4, 4)}) for _ in range(2)
        )
        self.tied, self.ratio = False, 2
        self.config = transformers.PretrainedConfig(clip=None)


def product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return x @ layer.weight.t()


class Direct(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) @ self.read.weight.t()


class Alias(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, layer = self.called, self.read
        weight = layer.weight
        return first(functional.linear(x, weight, layer.bias))


class ByName(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ getattr(self.read, "weight", None).t())


class ByAnotherMethod(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(self.fused(x))

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read.weight.data.sum()


class ByAFunction(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self.called(x), self.read)


class ByASubclass(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class InABranch(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.ratio > 1:
            return self.called(x @ self.read.weight)
        return self.called(self.read(x))


class OfAllInAStack(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.stack):
            x = block["called"](x) * number
            x = x + torch.cat([layer.weight for layer in block.children()]).sum()
        return self.called(self.read(x))


class OfAChild(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.inner["read"].weight)


READS = {
    **{key: {"read"} for key in (Direct, Alias, ByName, ByAnotherMethod, ByAFunction, ByASubclass, InABranch)},
    OfAllInAStack: {f"stack.{n}.{kind}" for n in (0, 1) for kind in ("read", "called")},
    OfAChild: {"inner.read"},
}


@pytest.mark.parametrize("kind", READS)
def test_a_read_is_found_in_every_form_and_the_layer_left_alone(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected, x = model(torch.ones(2, 4)), torch.ones(2, 4)
    reasons = left_alone(model)
    assert set(reasons) == {f"0.{name}" for name in READS[kind]}
    assert all("reads its weight" in reason for reason in reasons.values())
    adopted = adopt_all(model)
    assert set(adopted) == set(before) - set(reasons)
    assert all(model.get_submodule(name) is before[name] for name in reasons)
    torch.testing.assert_close(model(x), expected)


class Asks(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.read.weight, torch.Tensor) and x.dtype != self.read.weight.dtype:
            x = x.to(self.read.weight.dtype)
        size = self.called.weight.shape[0] + self.called.weight.size(1) + self.read.weight.data.numel()
        if self.read.bias is not None and self.read.weight.device.type != "meta" and size:
            x = x + self.read.weight.new_zeros(4)
        return self.read(self.called(x))

    def _init_weights(self, module: Any) -> None:
        nn.init.zeros_(self.read.weight)
        module.called.weight.data.zero_()

    def tie_weights(self) -> None:
        self.called.weight = self.read.weight


class RuledOut(Layers):
    def forward(self, x: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        if self.tied or (self.config.clip is not None and self.ratio > 1):
            x = x @ self.read.weight
        if states is not None:
            x = x @ self.called.weight
        return self.read(self.called(x))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", [Asks, RuledOut])
def test_a_question_is_no_read_nor_is_a_branch_that_this_model_never_takes(kind: type[nn.Module]) -> None:
    model = Outer(kind())
    assert left_alone(model) == {}
    adopt_all(model)
    assert isinstance(model.inner.read, FrozenLinear)


@pytest.mark.parametrize("setting", [{"tied": True}, {"config": transformers.PretrainedConfig(clip=1.0)}])
def test_a_branch_that_this_model_takes_counts(setting: dict[str, Any]) -> None:
    inner = RuledOut()
    inner.__dict__.update(setting)
    assert set(left_alone(Outer(inner))) == {"inner.read"}


def test_torchs_own_layers_read_the_weights_of_their_parts() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16))
    assert set(left_alone(model)) == {"0.out_proj", "1.self_attn.out_proj", "1.linear1", "1.linear2"}


def empty(config: str, auto: str = "CausalLM", **sizes: Any) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        made = tiny_config(f"{config}Config", **sizes)
        return getattr(transformers, f"AutoModelFor{auto}").from_config(made)  # type: ignore[no-any-return]


MAMBA = {"x_proj", "dt_proj", "out_proj"}  # the last two are handed to kernels, on CUDA
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "sizes", "read"),
    [
        ("Mamba", {}, MAMBA),
        ("FalconMamba", {}, MAMBA),
        ("Jamba", {"num_key_value_heads": 2, "num_experts": 2}, {"dt_proj"}),
        ("Mamba2", {"num_heads": 8, "head_dim": 8}, {"out_proj"}),
        ("Bamba", HEADS, {"out_proj"}),
        ("FalconH1", HEADS | {"mamba_d_ssm": 64}, {"out_proj"}),
        ("Rwkv", {}, {"output", "value"}),  # divided in place for inference
        ("Reformer", {"attn_layers": ["lsh"], "is_decoder": True, "axial_pos_embds": False}, {"query_key", "value"}),
        ("Bloom", {}, set()),
        ("Bloom", {"pretraining_tp": 2, "slow_but_exact": True}, {"dense", "dense_4h_to_h"}),
        ("Llama", {}, set()),
        ("Falcon", {}, set()),
    ],
)
def test_the_families_of_transformers(config: str, sizes: dict[str, Any], read: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in left_alone(empty(config, **sizes))} == read


def test_the_families_of_transformers_with_other_heads() -> None:
    assert left_alone(empty("Deberta", "MaskedLM")) == {}  # its read needs an argument that nobody can give
    assert left_alone(empty("T5", "Seq2SeqLM")) == {}  # it asks `wo` for its type
