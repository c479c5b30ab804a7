"""The centre of a grid is the rate of the method for the width of the layers that it is on."""

from __future__ import annotations

import pytest

import dist_subspace as dsub
from dist_subspace.rate_search.own_rate import own_rate
from dist_subspace.subspace import suggested_rate
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("method", "width"), [("lora", 32), ("houlsby", 32), ("prompt", 32)])
def test_the_width_is_that_of_most_layers_or_of_the_embedding(method: str, width: int) -> None:
    config = dsub.SubspaceConfig(method=method, rank=None if method != "lora" else 2)
    model = dsub.attach(tiny_model("LlamaForCausalLM"), config)
    assert own_rate(model).rate == suggested_rate(config, width).rate
