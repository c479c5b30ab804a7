"""Folded residuals and fitted starts on split, quantised weights: the same on two ranks as alone, and from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, disabled, load_adapter, load_frozen, save_adapter
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import SubspacePart, attached, attachment, trainable_parameters
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.storage.by_table import decoded_by_table
from tests.tiny_models import save_odd

STARTS: dict[str, dict[str, Any]] = {
    "pissa, folded": {"method": "pissa", "options": {"residual": "fold"}},
    "qpissa": {"method": "pissa", "options": {"residual": "fold", "iterations": 3}},
    "milora, folded": {"method": "milora", "options": {"residual": "fold"}},
    "olora, folded": {"method": "olora", "options": {"residual": "fold"}},
    "loftq": {"method": "lora", "options": {"init": "loftq"}},
    "loftq, 3 rounds": {"method": "rslora", "options": {"init": "loftq", "iterations": 3}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("residuals")
    for family in ("llama", "gpt2"):
        save_odd(folder, family)
    return folder


def frozen(models: Path, family: str, storage: str, config: dict[str, Any] | None = None) -> nn.Module:
    """With double quantisation: the mean that it takes out of a layer's absmax is no tensor, and must come along too."""
    return load_frozen(
        models / family, storage=storage, double_quant=True, deepspeed=config, dtype=torch.float32, device="cpu"
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.global_batch(9), use_cache=False).logits.float()


def trained_on_ranks(models: Path, family: str, storage: str, start: dict[str, Any], out: str) -> dict[str, Any]:
    """Three steps under ZeRO-3; what was seen on the way."""
    model = frozen(models, family, storage, tiny.ds_config(3, world_size=world().size))
    attach(model, SubspaceConfig(rank=3, **start))
    kept = [
        p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("lora_A0", "lora_B0", "loftq_A", "loftq_B")
    ]
    numel = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=numel, world_size=world().size))
    engine.eval()
    first = logits(engine)
    with disabled(model):
        base = logits(engine)
    engine.train()
    losses = [tiny.train_step(engine, tiny.own_batch(step, world().rank, world().size)) for step in range(tiny.STEPS)]
    engine.eval()
    last = logits(engine)
    save_adapter(model, out)
    split = bool(kept) and all(is_partitioned(p) for p in kept)
    engine.destroy()
    return {"first": first, "base": base, "last": last, "losses": losses, "split": split}


def trained_alone(models: Path, family: str, storage: str, start: dict[str, Any]) -> dict[str, Any]:
    model = attach(frozen(models, family, storage), SubspaceConfig(rank=3, **start)).train()
    first = logits(model)
    with disabled(model):
        base = logits(model)
    optimizer = tiny.adam(trainable_parameters(model), tiny.RATE)
    for step in range(tiny.STEPS):
        optimizer.zero_grad()
        ids = tiny.global_batch(step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return {"first": first, "base": base, "last": logits(model)}


@pytest.mark.parametrize(("family", "storage"), [("llama", "nf4"), ("gpt2", "int8")])
def test_a_folded_base_holds_what_bitsandbytes_makes_of_the_residual(models: Path, family: str, storage: str) -> None:
    model = attach(frozen(models, family, storage), SubspaceConfig(rank=3, **STARTS["pissa, folded"]))
    read = load_file(models / family / "model.safetensors")
    for name in attached(model).layers:
        part = model.get_submodule(name)
        weight = read[f"{name}.weight"]
        whole = weight.t() if family == "gpt2" else weight
        residual = (whole - part.lora_B0 @ part.lora_A0).contiguous()  # γ is 1: alpha is the rank
        if storage == "int8":
            codes, scale, _ = bnb_functional.int8_vectorwise_quant(residual.half())
            expected = bnb_functional.int8_vectorwise_dequant(codes, scale)
        else:
            packed, state = bnb_functional.quantize_4bit(residual, quant_type=storage, compress_statistics=True)
            expected = decoded_by_table(packed, state, tuple(residual.shape))
        torch.testing.assert_close(part.base.dense(), expected, rtol=1e-5, atol=1e-6)


ALWAYS = ("pissa, folded", "qpissa", "loftq, 3 rounds")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in STARTS])
def test_two_ranks_start_train_and_reload_as_one(name: str, models: Path, tmp_path: Path) -> None:
    family = "gpt2" if name in ("qpissa", "loftq") else "llama"
    storage = "int8" if name in ("olora, folded", "loftq") else "nf4"
    out = str(tmp_path / "adapter")
    alone = trained_alone(models, family, storage, STARTS[name])
    ranks = run_on_ranks(2, trained_on_ranks, models, family, storage, STARTS[name], out)
    for rank in ranks:
        assert rank["split"], "a kept factor lies whole on every rank"
        for what in ("first", "base", "last"):
            torch.testing.assert_close(rank[what], alone[what], rtol=1e-4, atol=1e-4)
    original, rounded = logits(frozen(models, family, "fp32")), logits(frozen(models, family, storage))
    if name == "qpissa" or "loftq" in name:
        assert (alone["first"] - original).norm() < 0.95 * (rounded - original).norm(), (
            "rounding's error was not fitted"
        )
    else:
        assert not torch.equal(alone["first"], rounded), "the base was not folded"
    if "folded" in name or name == "qpissa":
        assert torch.equal(alone["base"], alone["first"]), "disabled, it is not what it was before the first step"
    again = load_adapter(frozen(models, family, storage), out)
    torch.testing.assert_close(logits(again), ranks[0]["last"], rtol=1e-4, atol=1e-4)
    with disabled(again):
        torch.testing.assert_close(logits(again), alone["base"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["loftq", "qpissa"])
def test_a_float_storage_leaves_nothing_to_fit_and_the_model_as_it_was(name: str, storage: str, models: Path) -> None:
    model = load_frozen(models / "llama", storage=storage, device="cpu")
    with pytest.raises(
        UsageError, match=r"(init is 'loftq'|iterations is \d), but the frozen weights are not quantised"
    ):
        attach(model, SubspaceConfig(rank=3, **STARTS[name]))
    assert attachment(model) is None and not any(isinstance(m, SubspacePart) for m in model.modules())
    attach(model, SubspaceConfig(rank=3))


def test_a_model_that_came_rounded_from_elsewhere_cannot_be_folded(models: Path) -> None:
    model = frozen(models, "llama", "nf4")
    for module in model.modules():
        if hasattr(module, "origin"):
            module.origin = None
    for start in ("pissa, folded", "loftq"):
        with pytest.raises(UsageError, match="not read from one by load_frozen"):
            attach(model, SubspaceConfig(rank=3, **STARTS[start]))
        assert attachment(model) is None


@pytest.mark.parametrize("name", ["qpissa", "loftq, 3 rounds"])
def test_an_adapter_fitted_to_rounded_weights_loads_on_float_ones(name: str, models: Path, tmp_path: Path) -> None:
    save_adapter(attach(frozen(models, "llama", "nf4"), SubspaceConfig(rank=3, **STARTS[name])), tmp_path)
    assert attachment(load_adapter(frozen(models, "llama", "fp32"), tmp_path)) is not None
