"""P-tuning: counts, the encoders against torch's own layers, what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig
from peft.tuners.p_tuning import PromptEncoder
from torch import nn

from dist_subspace import attach, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.subspace import named_trainables
from tests.subspace.virtual_tokens.given import COUNT, config, ids, model_with
from tests.tiny_models import tiny_model


def part(**options: Any) -> Any:
    """Of a model of width 8, with 5 virtual tokens."""
    model = tiny_model(hidden_size=8, num_hidden_layers=1)
    return attach(model, config("p-tuning", **{"num_virtual_tokens": 5, "hidden": 6, **options})).prompt_tokens


def test_counts() -> None:
    assert sum(p.numel() for p in part().parameters()) == 192
    assert sum(p.numel() for p in part(encoder="lstm").parameters()) == 2028


def peft_encoder(kind: str) -> nn.Module:
    settings = {"num_virtual_tokens": 5, "token_dim": 8, "num_transformer_submodules": 1, "encoder_hidden_size": 6}
    return PromptEncoder(PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_dropout=0.0, **settings))


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_the_encoder_is_pefts(kind: str) -> None:
    """PEFT's encoder with our values, layer by layer in the order in which torch registers them."""
    ours, theirs = part(encoder=kind), peft_encoder(kind.upper())
    heads = [p for name, p in ours.named_parameters() if name.startswith("head_")]
    recurrent = [p for name, p in ours.named_parameters() if name.startswith("lstm_")]
    with torch.no_grad():
        for mine, their in zip([ours.embedding, *recurrent, *heads], theirs.parameters(), strict=True):
            assert mine.shape == their.shape
            their.copy_(mine)
        torch.testing.assert_close(ours(), theirs(torch.arange(5)[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_everything_in_the_encoder_is_trained(kind: str) -> None:
    model = model_with("p-tuning", encoder=kind)
    model(input_ids=ids(2, 7), labels=ids(2, 7)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model))


def test_the_hidden_width_is_the_embeddings_unless_given() -> None:
    model = attach(tiny_model(), config("p-tuning"))
    assert named_trainables(model)["prompt_tokens.head_0"].shape == (32, 32)


def test_the_file_holds_what_the_encoder_made_and_loads_without_it() -> None:
    made = part(encoder="lstm")
    tensors = made.file_tensors()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"prompt_embeddings": (5, 8)}
    plain = part(encoder="none")
    plain.load_file_tensors(tensors)
    assert torch.equal(plain(), made()) and [name for name, _ in plain.named_parameters()] == ["prompt_embeddings"]
    with pytest.raises(UsageError, match="holds what its encoder made, and not the encoder"):
        part(encoder="mlp").load_file_tensors(tensors)


def test_initial_tokens_differ_from_one_another() -> None:
    rows = attach(tiny_model(), config("p-tuning")).prompt_tokens().detach()
    assert torch.pdist(rows).min() > 0.05 and len(rows) == COUNT
