"""Which weights a storage holds is decided by the model and the file's names, before anything is read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.packing import Packing
from dist_subspace.loading.sources import find_sources
from dist_subspace.loading.stays_dense import may_lack
from dist_subspace.loading.transformers_internals import key_plan
from tests.tiny_models import tiny_model

HELD = ("nf4", {"double_quant": True})


def packing_of(name: str, folder: Path, head: Any = None) -> Packing:
    model: Any = tiny_model(name, tie_word_embeddings=False)
    model.save_pretrained(folder)
    index = open_checkpoint(folder)
    sources = find_sources(model, index, key_plan(model, index), partial(may_lack, model))
    return Packing(model, index, sources, HELD, torch.float32, head)


@pytest.mark.parametrize("head", [None, ("int8", {})])
def test_a_storage_holds_the_linear_layers_and_the_head_only_where_it_has_one_of_its_own(
    head: Any, tmp_path: Path
) -> None:
    packing = packing_of("LlamaForCausalLM", tmp_path, head)
    packed = {name for name, module in packing.model.named_modules() if packing.packs(name, module)}
    linear = {name for name, module in packing.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packed == (linear if head else linear - {"lm_head"}) and len(linear) > 7
    assert packing.held_in("lm_head.weight") == (head or HELD)
    assert packing.held_in("model.layers.0.mlp.up_proj.weight") == HELD


def test_a_layer_whose_type_is_its_own_stays_as_the_model_has_it(tmp_path: Path) -> None:
    packing = packing_of("LlamaForCausalLM", tmp_path)
    name = "model.layers.0.mlp.up_proj"
    layer = packing.model.get_submodule(name)
    assert packing.packs(name, layer)
    assert not packing.packs(name, layer.to(torch.float64))
