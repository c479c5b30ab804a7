"""CPU offload, and engines of a stock JSON that run in bf16 or fp16: the same losses, and packed bytes that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.cpp_helpers import check_nvme_helpers
from dist_subspace.placement.deepspeed.optimizer_state import plain_optimizer
from dist_subspace.placement.tensors import full_numel, gathered, resident_bytes
from dist_subspace.subspace import named_trainables, trainable_parameters
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd, tiny_model

OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "optimizer and parameters": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def trained(
    folder: str, storage: str, stage: int, dtype: str, zero: dict[str, Any], sections: dict[str, Any]
) -> dict[str, Any]:
    """Three steps; losses, whether frozen bytes stayed and the adapter moved, and what lies where."""
    size = world().size
    config = tiny.ds_config(stage, world_size=size, **zero) | sections
    model = load_frozen(folder, storage=storage, dtype=dtype, deepspeed=config)
    attach(model, SubspaceConfig(method="lora", rank=3)).train()
    config["zero_optimization"]["reduce_bucket_size"] = sum(full_numel(p) for p in trainable_parameters(model))
    packed = {n: p for n, p in tiny.frozen_parameters(model).items() if not p.is_floating_point()}
    before = _whole(packed)
    adapter = _whole(named_trainables(model))
    engine = tiny.make_engine(model, config)
    losses = [tiny.train_step(engine, tiny.own_batch(s, world().rank, size)) for s in range(tiny.STEPS)]
    after, moved = _whole(packed), _whole(named_trainables(model))
    frozen = tiny.frozen_parameters(model)
    found = {
        "losses": losses,
        "packed": len(packed),
        "packed_same": all(torch.equal(after[n], before[n]) for n in packed),
        "still": [n for n in adapter if torch.equal(moved[n].float(), adapter[n].float())],
        "adapter_dtypes": sorted({str(t.dtype) for t in moved.values()}),
        "optimizer": type(plain_optimizer(engine)).__name__,
        "resident": resident_bytes(frozen.values()),
        "shards": tiny.shard_bytes(frozen, size if stage == 3 else 1),
    }
    engine.destroy()
    return found


def _whole(parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "optimizer and parameters")])
def test_offload_to_the_cpu_trains_to_the_same_losses(llama: str, storage: str, stage: int, offload: str) -> None:
    plain = run_on_ranks(2, trained, llama, storage, stage, "float32", {}, {})
    for rank, facts in enumerate(run_on_ranks(2, trained, llama, storage, stage, "float32", OFFLOADS[offload], {})):
        assert facts["losses"] == pytest.approx(plain[rank]["losses"], rel=1e-5)
        assert facts["packed_same"] and facts["packed"] > 0 and facts["still"] == []
        assert facts["optimizer"] == "AdamW", "torch's own, nothing is compiled"
        assert facts["resident"] == facts["shards"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
def test_a_bf16_engine_leaves_packed_bytes_and_statistics_as_they_are(llama: str, storage: str, stage: int) -> None:
    ours = run_on_ranks(2, trained, llama, storage, stage, "bfloat16", {}, {})
    theirs = run_on_ranks(2, trained, llama, storage, stage, "bfloat16", {}, {"bf16": {"enabled": True}})
    for own, stock in zip(ours, theirs, strict=True):
        assert stock["losses"] == pytest.approx(own["losses"], rel=2e-2)
        assert stock["packed_same"] and (stock["packed"] > 0) == (storage != "bf16")
        assert stock["still"] == []
        assert own["adapter_dtypes"] == ["torch.float32"], "an engine in fp32 keeps adapters in fp32"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_fp16_engine_leaves_packed_bytes_and_statistics_as_they_are(llama: str, stage: int) -> None:
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        pytest.skip(f"DeepSpeed's accelerator {get_accelerator()._name} has no fp16 engine here")
    scaler = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    ours = run_on_ranks(2, trained, llama, "nf4", stage, "float16", {}, {})
    theirs = run_on_ranks(2, trained, llama, "nf4", stage, "float16", {}, scaler)
    for own, stock in zip(ours, theirs, strict=True):
        assert stock["losses"] == pytest.approx(own["losses"], rel=1e-2)
        assert stock["packed_same"] and stock["packed"] > 0 and stock["still"] == []


def on_nvme(folder: str, storage: str, dtype: str, swap: str) -> dict[str, Any]:
    """Frozen weights that lie in files: which of them are not the file's bits when they are gathered, how many files there are,
    and the losses of three steps beside those of shards in memory."""
    nvme = {"device": "nvme", "nvme_path": swap, "max_in_cpu": 0, "buffer_size": 1_000_000, "pin_memory": False}
    model = load_frozen(folder, storage, dtype=dtype, deepspeed=tiny.ds_config(3, world_size=2, offload_param=nvme))
    plain = dict(load_frozen(folder, storage, dtype=dtype).named_parameters())
    wrong = []
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            wrong += [] if torch.equal(parameter.data, plain[name].data) else [name]
    files = sum(1 for path in Path(swap).rglob("*") if path.is_file())
    del model
    losses = trained(folder, storage, 3, dtype, {"offload_param": nvme}, {})["losses"]
    return {"wrong": wrong, "files": files, "losses": losses}


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_weights_on_nvme_are_the_files_bits_and_train_to_the_same_losses(
    storage: str, dtype: str, tmp_path: Path
) -> None:
    """Shards below a mebibyte stay in memory: these are larger, and their length is no multiple of a block of the disk."""
    try:
        check_nvme_helpers({"zero_optimization": {"offload_param": {"device": "nvme"}}})
    except UsageError as error:
        pytest.skip(str(error))
    model, swap = str(tmp_path / "model"), tmp_path / "swap"
    swap.mkdir()
    tiny_model(hidden_size=768, intermediate_size=2050).save_pretrained(model)
    plain = run_on_ranks(2, trained, model, storage, 3, dtype, {}, {})
    for rank, facts in enumerate(run_on_ranks(2, on_nvme, model, storage, dtype, str(swap), timeout=900)):
        assert facts["wrong"] == [] and facts["files"] >= 12, "three matrices of two blocks on two ranks, and more"
        assert facts["losses"] == plain[rank]["losses"]
