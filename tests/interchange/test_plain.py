"""The entries of a plain model: each tied parameter once, where a reader ties it, and how far a base is from its original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach
from dist_subspace.errors import UsageError
from dist_subspace.interchange.plain import Drift, Entry, each_once, plain_entries
from tests.interchange.trained import trained
from tests.tiny_models import tiny_model


def entry(name: str, identity: object) -> Entry:
    return Entry(name, (1,), torch.float32, (), lambda: torch.zeros(1), (identity,))


def names(entries: list[Entry]) -> list[str]:
    return [found.name for found in entries]


def test_tied_parameters_are_written_once_under_their_first_name() -> None:
    entries = [entry("embed", 1), entry("other", 2), entry("head", 1)]
    assert names(each_once(entries, {})) == ["embed", "other"]
    assert names(each_once(entries, {"head": "embed"})) == ["embed", "other"]


def test_what_a_reader_would_tie_and_is_different_now_is_written_in_full() -> None:
    entries = [entry("embed", 1), entry("encoder", 1), entry("head", 2), entry("other", 1)]
    pairs = {"encoder": "embed", "head": "embed"}
    assert names(each_once(entries, pairs)) == ["embed", "encoder", "head", "other"]


def plain(model: Any, base: str = "dequantised", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    entries = plain_entries(model, Drift(base), dtype)
    made = {found.name: found.make() for found in entries}
    assert all(tuple(made[found.name].shape) == found.shape for found in entries)
    assert {found.dtype for found in entries} == {dtype}
    return made


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_the_entries_are_the_base_models_state_with_the_update_in_it(name: str) -> None:
    base, model = tiny_model(name), trained(tiny_model(name), "lora")
    made = plain(model)
    expected = dict(base.named_parameters(remove_duplicate=False))
    assert set(expected) <= set(made)
    changed = {n for n in expected if not torch.allclose(made[n], expected[n])}
    assert changed == {f"{layer}.weight" for layer in model.subspace.layers}
    layer = model.subspace.layers[0]
    part = model.get_submodule(layer)
    update = part.scale * part.lora_B.detach() @ part.lora_A.detach()
    difference = (made[f"{layer}.weight"] - expected[f"{layer}.weight"]).detach()
    torch.testing.assert_close(difference, update.t() if name.startswith("GPT2") else update, rtol=1e-4, atol=1e-5)


def test_a_module_that_was_trained_in_full_stands_in_its_own_place() -> None:
    model = trained(tiny_model("Qwen2ForCausalLM"), "lora", modules_to_save=["lm_head"])
    made = plain(model)
    assert "lm_head.weight" in made and not any("trained" in name or "original" in name for name in made)
    assert torch.equal(made["lm_head.weight"], model.lm_head.trained.weight)


def test_another_base_is_refused_and_so_is_an_original_that_was_never_read() -> None:
    model = attach(tiny_model(), SubspaceConfig(rank=2))
    with pytest.raises(UsageError, match=r"base is 'other'.*accepted: dequantised, original"):
        plain(model, "other")
    with pytest.raises(
        UsageError, match=r"base is 'original', but model\.layers\.0\.self_attn\.q_proj was not read from"
    ):
        plain(model, "original")


@pytest.mark.parametrize(("method", "config"), [("prompt", {}), ("lora", {"constraint": "mpc_n"})])
def test_a_method_that_is_no_change_of_the_weights_cannot_be_merged(method: str, config: dict[str, Any]) -> None:
    rank = {"rank": 2} if method == "lora" else {}
    model = attach(tiny_model(), SubspaceConfig(method=method, **rank, **config))
    with pytest.raises(UsageError, match=f"method {method} .*cannot be merged"):
        plain(model)


def test_the_distance_over_all_layers_weighs_each_by_its_size() -> None:
    drift = Drift("dequantised")
    assert drift.overall() is None and drift.by_layer() == {}
    drift.distances |= {"a": (3.0, 10.0), "b": (4.0, 0.0)}
    assert drift.by_layer()["a"] == pytest.approx(0.3)
    assert drift.overall() == pytest.approx(0.5)
