"""Copies of the base's own weights in an adapter's file: left out where they are copies, refused where they are others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.interchange.peft.base_copies import SAMPLES, check_copies, split_copies
from dist_subspace.storage import adopt_all
from tests.tiny_models import tiny_model

PREFIX = "base_model.model."
TABLE = "model.embed_tokens.weight"


def test_the_methods_own_tensors_are_told_from_the_bases() -> None:
    names = ["layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.bias", "lora_embedding_A"]
    tensors = {f"{PREFIX}{name}": torch.ones(2, 2) for name in names}
    copies = {f"{PREFIX}{TABLE}": torch.ones(3, 2), f"{PREFIX}layers.0.q_proj.base_layer.bias": torch.zeros(2)}
    own, found = split_copies(tensors | copies | {"other.weight": torch.ones(1)}, "lora_")
    assert set(own) == {*tensors, "other.weight"}
    assert {name: copy["shape"] for name, copy in found.items()} == {TABLE: [3, 2], "layers.0.q_proj.bias": [2]}
    assert len(split_copies({f"{PREFIX}{TABLE}": torch.ones(100, 100)}, "lora_")[1][TABLE]["sample"]) == SAMPLES


def check(tensors: dict[str, Tensor]) -> None:
    model = tiny_model(attention_bias=True)
    adopt_all(model)
    check_copies(model, split_copies({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, "lora_")[1])


def test_a_copy_may_be_rounded_and_of_the_weights_that_operators_hold() -> None:
    held = dict(tiny_model(attention_bias=True).named_parameters())
    names = (
        TABLE,
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    )
    check({name: held[name].detach().to(torch.bfloat16) for name in names})
    check({})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (TABLE, torch.zeros(96, 32)),
        (TABLE, torch.zeros(98, 32)),  # the vocabulary was changed
        ("model.layers.0.mlp.up_proj.bias", torch.zeros(44)),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(44, 32)),
        ("model.norm.bias", torch.zeros(32)),
    ],
)
def test_what_is_no_copy_of_this_models_own_is_refused(name: str, tensor: Tensor) -> None:
    with pytest.raises(UsageError, match=rf"the adapter holds {PREFIX}{name}, which is not known here"):
        check({name: tensor})


def test_one_value_that_is_another_is_seen_at_both_ends() -> None:
    held = dict(tiny_model(attention_bias=True).named_parameters())[TABLE].detach()
    check({TABLE: held})
    for place in (0, -1):
        changed = held.clone()
        changed.view(-1)[place] += 1
        with pytest.raises(UsageError, match="is no copy"):
            check({TABLE: changed})
