"""Models that read weights of linear layers compute what transformers computes, in every storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import attached, trainable_parameters
from tests.tiny_models import tiny_config

# configuration -> its sizes, the task, a layer that is read
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "Mamba": ({}, "causal-lm", "backbone.layers.0.mixer.dt_proj"),
    "Mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 1}, "causal-lm", "backbone.layers.0.mixer.out_proj"),
    "MobileBert": (
        {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "max_position_embeddings": 32},
        "masked-lm",
        "cls.predictions.dense",
    ),
    "Rwkv": ({"attention_hidden_size": 32, "rescale_every": 1}, "causal-lm", "rwkv.blocks.1.attention.output"),
    "Gemma3nText": (
        {"num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64}
        | {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        "causal-lm",
        "model.layers.0.altup.correction_coefs",
    ),
}
AUTO = {"causal-lm": transformers.AutoModelForCausalLM, "masked-lm": transformers.AutoModelForMaskedLM}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (sizes, task, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = AUTO[task].from_config(tiny_config(f"{name}Config", **sizes))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(2)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def reference(folder: Path, name: str) -> nn.Module:
    return AUTO[FAMILIES[name][1]].from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def loaded(folder: Path, name: str, storage: str) -> Any:
    return load_frozen(folder, storage=storage, dtype="float32", task=FAMILIES[name][1])


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_transformers_with_the_same_weights(folders: dict[str, Path], name: str, storage: str) -> None:
    model, expected = loaded(folders[name], name, storage), reference(folders[name], name)
    for layer, operator in model.named_modules():
        if isinstance(operator, FrozenLinear):
            expected.get_submodule(layer).weight.data = operator.dense()  # type: ignore[union-attr]
    read = model.get_submodule(FAMILIES[name][2])
    assert type(read) is nn.Linear and read.weight.dtype == torch.float32
    wanted = logits(expected)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_method_on_all_linear_leaves_them_out_says_so_and_trains_the_others(
    folders: dict[str, Path], name: str, said: list[str]
) -> None:
    model = reference(folders[name], name)
    with torch.no_grad():
        before = logits(model)
    read = FAMILIES[name][2]
    said.clear()
    attach(model, SubspaceConfig(rank=2))
    assert read not in attached(model).layers
    if read.startswith("cls"):  # a head, which all-linear never means
        assert not said
    else:
        assert any("left out of all-linear" in line and "reads its weight" in line for line in said)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), before)
        for parameter in trainable_parameters(model):
            parameter.add_(0.01 * torch.randn_like(parameter))
    logits(model.train()).square().sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
    assert (
        sum(float(p.grad.abs().max()) > 0 for p in trainable_parameters(model)) > len(trainable_parameters(model)) // 2
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_is_read_is_refused_where_the_user_names_it(folders: dict[str, Path], name: str) -> None:
    read = FAMILIES[name][2]
    for targets in ([read], [read.rpartition(".")[2]] if name != "MobileBert" else [read], f".*{read}"):
        with pytest.raises(
            UsageError, match=r"target_modules has .*no method can be put on it, because .* reads its weight"
        ):
            attach(reference(folders[name], name), SubspaceConfig(rank=1, target_modules=targets))


def test_an_ending_that_names_other_layers_too_leaves_the_read_one_out(
    folders: dict[str, Path], said: list[str]
) -> None:
    model = reference(folders["MobileBert"], "MobileBert")
    attach(model, SubspaceConfig(rank=2, target_modules=["dense"]))
    assert attached(model).layers and "cls.predictions.dense" not in attached(model).layers
    assert any("cls.predictions.dense" in line for line in said)


def test_a_packed_storage_says_what_it_does_not_hold(folders: dict[str, Path], said: list[str]) -> None:
    loaded(folders["Mamba"], "Mamba", "nf4")
    loaded(folders["Mamba"], "Mamba", "fp32")
    assert len(said) == 2 and said[0].startswith(
        "held in float32 and not in nf4: backbone.layers.0.mixer.x_proj and 1 like it, "
    )
    assert "MambaMixer.forward reads its weight" in said[0] and "conv1d.weight" in said[1]


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_packed_bytes_are_never_taken_for_a_matrix(storage: str, folders: dict[str, Path]) -> None:
    layer = loaded(folders["Mamba"], "Mamba", storage).backbone.layers[0].mixer.in_proj
    weight = layer.weight
    assert weight.dtype == torch.float32 and tuple(weight.shape) == layer.shape and weight.device.type == "cpu"
    assert isinstance(weight, torch.Tensor) and not hasattr(weight, "quant_state") and not weight.requires_grad
    x = torch.ones(2, layer.in_features)
    for read in (
        lambda: x @ weight.t(),
        lambda: nn.functional.linear(x, weight),
        lambda: weight.data.mul_(2),
        lambda: weight[0],
    ):
        with pytest.raises(
            UsageError, match=rf"reads the weight of backbone\.layers\.0\.mixer\.in_proj, which is held as {storage}"
        ):
            read()


def test_a_weight_under_a_method_is_never_read_past_it(folders: dict[str, Path]) -> None:
    model = attach(loaded(folders["Mamba"], "Mamba", "fp32"), SubspaceConfig(rank=2))
    weight = model.backbone.layers[0].mixer.in_proj.weight
    assert weight.dtype == torch.float32
    with pytest.raises(
        UsageError, match=r"reads the weight of backbone\.layers\.0\.mixer\.in_proj, which has method lora on it"
    ):
        nn.functional.linear(torch.ones(1, 32), weight)
