"""Whether an adapter is for a model: its layers, their shapes, and the modules that it holds in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, attach
from dist_subspace.errors import UsageError
from dist_subspace.interchange.fitting import check_fits, check_layers
from tests.tiny_models import tiny_model

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
TABLE, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


@pytest.mark.parametrize("attached", [False, True])
def test_layers_of_the_same_shapes_fit_and_a_side_may_be_unknown(attached: bool) -> None:
    model: Any = tiny_model()
    if attached:
        attach(model, SubspaceConfig(rank=2))
    check_layers(model, {Q: (32, 32), "model.layers.1.mlp.down_proj": (32, 44), "lm_head": (None, 32)})


def test_a_conv1d_is_asked_for_out_times_in() -> None:
    check_layers(tiny_model("GPT2LMHeadModel"), {"transformer.h.0.attn.c_attn": (96, 32)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({Q: (32, 16)}, rf"the adapter is for a {Q} of 32 x 16, but this model's is 32 x 32: it belongs to another"),
        ({Q: (None, 16)}, r"of \? x 16, but"),
        ({"model.layers.9.mlp.up_proj": (44, 32)}, r"which is no linear layer of this model \(LlamaForCausalLM\)"),
        (
            {"model.norm": (32, 32)},
            r"layers here are for example: model\.layers\.0\.self_attn\.q_proj, model\.layers\.0",
        ),
    ],
)
def test_another_models_layers_are_refused_by_name_and_shape(shapes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_layers(tiny_model(), shapes)


def fits(tensors: dict[str, torch.Tensor], described: dict[str, Any] | None = None, **config: Any) -> None:
    tied: Any = tiny_model(tie_word_embeddings=True)
    check_fits(tied, SubspaceConfig(**config), tensors, described or {}, {})


def test_tied_modules_are_put_in_where_both_are_there_and_equal() -> None:
    one, other = torch.ones(96, 32), torch.zeros(96, 32)
    fits({TABLE: one, HEAD: one.clone()}, modules_to_save=["lm_head"])
    for tensors in ({HEAD: one}, {TABLE: other, HEAD: one}):
        with pytest.raises(
            UsageError, match=r"holds lm_head trained apart from model.embed_tokens, to which this model ties"
        ):
            fits(tensors, modules_to_save=["lm_head"])
    untied: Any = tiny_model("Qwen2ForCausalLM")
    check_fits(untied, SubspaceConfig(modules_to_save=["lm_head"]), {HEAD: one}, {}, {})


def test_a_module_that_is_none_of_the_models_is_refused() -> None:
    with pytest.raises(
        UsageError, match="the adapter holds classifier trained in full, which is no module of this model"
    ):
        fits({}, modules_to_save=["classifier"])


def test_virtual_tokens_have_the_models_width_and_a_prefix_its_layers() -> None:
    tokens = {"prompt_embeddings": torch.zeros(4, 32)}
    fits(tokens, method="prompt")
    with pytest.raises(UsageError, match=r"is for a width of 16, but this model's is 32"):
        fits({"prompt_embeddings": torch.zeros(4, 16)}, method="prompt")
    fits({"prompt_embeddings": torch.zeros(4, 64)}, {"num_layers": 2}, method="prefix")
    with pytest.raises(UsageError, match=r"is for a number of layers of 3, but this model's is 2"):
        fits({"prompt_embeddings": torch.zeros(4, 64)}, {"num_layers": 3}, method="prefix")
