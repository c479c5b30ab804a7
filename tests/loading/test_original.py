"""The checkpoint's own matrix is read again, for every layout, or its absence is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.loading.original import original_of
from dist_subspace.storage import FrozenLinear, adopt_all
from tests.tiny_models import tiny_model


def operators(model: torch.nn.Module) -> dict[str, FrozenLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
def test_the_original_is_the_checkpoints_matrix_exactly(name: str, storage: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    plain.save_pretrained(tmp_path)
    for layer, operator in operators(dsub.load_frozen(tmp_path, storage=storage)).items():
        weight = plain.get_submodule(layer).weight.detach()
        original = original_of(operator)
        assert original.shape == operator.shape and original.dtype == torch.float32 and original.is_contiguous()
        assert torch.equal(original, weight.t() if operator.conv1d else weight), layer


def test_a_model_that_was_not_read_from_a_checkpoint_has_no_original() -> None:
    model = tiny_model()
    adopt_all(model)
    with pytest.raises(UsageError, match="not read from a checkpoint by load_frozen; accepted: a model of load_frozen"):
        original_of(model.model.layers[0].mlp.up_proj)


def test_a_file_that_went_or_changed_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    operator = dsub.load_frozen(tmp_path, storage="nf4").model.layers[0].mlp.up_proj
    file = tmp_path / "model.safetensors"
    key = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key][1:].clone()}, file)
    with pytest.raises(UsageError, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight as \[43, 32\] now"):
        original_of(operator)
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    with pytest.raises(UsageError, match=r"model\.safetensors no longer holds model\.layers\.0\.mlp\.up_proj\.weight"):
        original_of(operator)
    file.unlink()
    with pytest.raises(UsageError, match="no longer holds"):
        original_of(operator)
