"""What a block keeps for backward on an accelerator, in the real sizes of the recipes, against what the headers' peaks count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from dist_subspace.loading.experts_internals import adopt_stacks
from dist_subspace.storage import adopt_all
from tests.config.headers import RECIPES
from tests.config.recipes import Recipe, block_activations, put_method
from tests.config.shapes import SHAPES
from tests.devices.pretended import Pretended, device

TOKENS = 512
# One of each family and each method.
TRIED = (
    *(
        "llama-3.1-8b-24gb",
        "qwen3-32b-4x48gb",
        "qwen2.5-7b-dora",
        "qwen2.5-7b-pissa",
        "qwen2.5-7b-ssl",
        "qwen2.5-7b-ssb",
    ),
    "roberta-large-sst2",
)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output, and a number a row in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Attention.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused", _fused)


def kept_bytes(recipe: Recipe, shape: PretrainedConfig, layers: int) -> int:
    """Of a forward of `layers` blocks over `TOKENS` tokens, parameters and buffers apart."""
    shape, pretended = copy.deepcopy(shape), Pretended()
    shape.num_hidden_layers, shape.use_cache = layers, False
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:layers]
    with torch.device("meta"):
        kind = (
            AutoModelForSequenceClassification if recipe.config.model.task == "classification" else AutoModelForCausalLM
        )
        model = kind.from_config(shape, dtype=torch.bfloat16, attn_implementation="fused")
        adopt_all(model)
        put_method(model, recipe.config)
    _moved(model.train(), pretended)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and tensor.untyped_storage()._cdata not in storages:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with pretended.mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = torch.zeros(1, TOKENS, shape.hidden_size, dtype=torch.bfloat16, device=device()).requires_grad_()
        positions = torch.zeros(1, TOKENS, dtype=torch.long, device=device())
        model.base_model(inputs_embeds=embeddings, position_ids=positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _moved(model: nn.Module, pretended: Pretended) -> None:
    """From the device meta, without values, to the pretended one."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake = pretended.tensor(*tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        with pretended.mode, torch.no_grad():
                            fake = nn.Parameter(fake, tensor.requires_grad)
                    known[id(tensor)] = (fake, tensor)
                held[name] = known[id(tensor)][0]


@pytest.mark.parametrize("name", TRIED)
def test_a_block_keeps_no_more_than_a_recipes_peak_counts(name: str) -> None:
    recipe = next(Recipe(path) for path in RECIPES if path.stem == name)
    shape = SHAPES[recipe.config.model.path]
    kept = kept_bytes(recipe, shape, 2) - kept_bytes(recipe, shape, 1)
    assert 0.5 < kept / block_activations(shape, TOKENS) < 1.0


def test_a_block_of_a_mixture_keeps_no_more_than_a_recipes_peak_counts() -> None:
    """On the CPU, where tokens have experts, and a hundredth of the real widths; adapters on the experts, too."""
    recipe = next(Recipe(path) for path in RECIPES if path.stem == "qwen3-30b-a3b-24gb")
    small = {"hidden_size": 128, "moe_intermediate_size": 48, "num_experts": 16, "head_dim": 8}
    shape = copy.deepcopy(SHAPES[recipe.config.model.path])
    for name, size in small.items():
        setattr(shape, name, size)
    kept = [kept_of_a_mixture(recipe, shape, layers) for layers in (1, 2)]
    assert 0.5 < (kept[1] - kept[0]) / block_activations(shape, TOKENS) < 1.0


def kept_of_a_mixture(recipe: Recipe, shape: PretrainedConfig, layers: int) -> int:
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers, shape.use_cache, shape.layer_types = layers, False, None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="fused")
    adopt_all(model)
    adopt_stacks(model)
    put_method(model, recipe.config)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = torch.randn(1, TOKENS, shape.hidden_size, dtype=torch.bfloat16).requires_grad_()
        model.train().base_model(inputs_embeds=embeddings, position_ids=torch.arange(TOKENS)[None])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
