"""What ZeRO-3 does to frozen operators: split before or at initialize, gathered whole inside a step, gone after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.families.blocks import blocks
from dist_subspace.placement.collectives import barrier, world
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.placement.deepspeed.partitioner import Partitioner
from dist_subspace.placement.deepspeed.shards import is_partitioned, rewritten
from dist_subspace.placement.tensors import full_numel, full_shape, gathered, kept_bytes, resident_bytes
from dist_subspace.subspace import trainable_parameters
from tests.benchmarks.collectives import Measured, measure_all
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

QUANTISED = ("nf4", "nf4-double", "int8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_odd(folder, family) for family in ("llama", "gpt2")}


# Loading.


def loaded_facts(folder: str, storage: str) -> dict[str, Any]:
    """Before `deepspeed.initialize`: what is split, into which shards, and whether they come together to the whole."""
    model = load_frozen(folder, storage=storage, dtype="float32", deepspeed=tiny.ds_config(3, world_size=world().size))
    alone = dict(load_frozen(folder, storage=storage, dtype="float32", device="cpu").named_parameters())
    parameters = dict(model.named_parameters())
    facts = {
        "split": all(is_partitioned(p) for p in parameters.values()),
        "resident": resident_bytes(parameters.values()),
        "shards": tiny.shard_bytes(parameters, world().size),
        "names": list(parameters) == list(alone),
        "shapes": all(full_shape(p) == tuple(alone[n].shape) for n, p in parameters.items()),
    }
    with gathered(parameters.values()):
        facts["equal"] = all(torch.equal(p.detach(), alone[n].detach()) for n, p in parameters.items())
    facts["resident_after_gather"] = resident_bytes(parameters.values())
    return facts


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
def test_load_frozen_splits_every_parameter_before_initialize(models: dict[str, str], storage: str, ranks: int) -> None:
    kind = "fp32" if storage == "bf16" else storage
    for family in models:
        for facts in run_on_ranks(ranks, loaded_facts, models[family], kind):
            assert facts["split"] and facts["names"] and facts["shapes"] and facts["equal"]
            assert facts["resident"] == facts["shards"] == facts["resident_after_gather"]


# Models that DeepSpeed splits itself.


def quantised_by_transformers(folder: str, kind: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "plain":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    four_bit = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": kind == "nf4-double",
        "bnb_4bit_compute_dtype": torch.float32,
    }
    settings = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four_bit))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )


def trained_by_stage(folder: str, kind: str, stage: int) -> dict[str, Any]:
    """Losses of three steps of a model that transformers loaded, and its frozen bytes on this rank after them."""
    model = attach(quantised_by_transformers(folder, kind), SubspaceConfig(method="lora", rank=3)).train()
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(stage, trainable_numel=trained, world_size=world().size))
    frozen = tiny.frozen_parameters(model)
    losses = [tiny.train_step(engine, tiny.own_batch(s, world().rank, world().size)) for s in range(tiny.STEPS)]
    facts = {
        "losses": losses,
        "unsplit": [name for name, p in frozen.items() if not is_partitioned(p)],
        "resident": resident_bytes(frozen.values()),
        "shards": tiny.shard_bytes(frozen, world().size),
        "whole": tiny.whole_bytes(frozen),
        "names": sorted({name.rpartition(".")[2] for name in frozen}),
    }
    engine.destroy()
    return facts


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", *QUANTISED])
def test_a_model_that_transformers_loaded_is_split_at_initialize(
    models: dict[str, str], family: str, kind: str
) -> None:
    replicated = run_on_ranks(2, trained_by_stage, models[family], kind, 0)
    for rank, facts in enumerate(run_on_ranks(2, trained_by_stage, models[family], kind, 3)):
        assert facts["unsplit"] == []
        assert facts["resident"] == facts["shards"] < 0.52 * facts["whole"]
        assert facts["losses"] == pytest.approx(replicated[rank]["losses"], rel=1e-5)
        assert {"nf4": "absmax", "nf4-double": "nested_absmax", "int8": "scale"}.get(kind, "weight") in facts["names"]


# Leaf modules.


def traffic_rows(folder: str, storage: str) -> list[Measured]:
    return measure_all(folder, storage)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_leaf_blocks_need_fewer_collectives_and_give_the_same_gradients(models: dict[str, str], storage: str) -> None:
    """Checkpointing off, non-reentrant and reentrant; the bytes are at most those without leaf modules."""
    for rows in run_on_ranks(2, traffic_rows, models["llama"], storage):
        first = rows[0].gradients
        for row in rows:
            assert row.gradients.keys() == first.keys()
            for name, gradient in row.gradients.items():
                assert gradient.any(), f"{name} has no gradient ({row.checkpointing}, leaf {row.leaf})"
                torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-7)
        for off, on in zip(rows[0::2], rows[1::2], strict=True):
            assert not off.leaf and on.leaf and off.checkpointing == on.checkpointing
            assert on.gathers < off.gathers and on.gathered_bytes <= off.gathered_bytes
            assert on.gathers < len(first), "the trained parameters come together in one collective after a step"


# The thresholds, and that the test of resident bytes can fail.


def resident_after_a_step(folder: str, threshold: int) -> tuple[int, int, int]:
    """(resident, shards, whole) frozen bytes with a persistence threshold in elements."""
    config = tiny.ds_config(3, trainable_numel=1, world_size=world().size)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    model = load_frozen(folder, storage="nf4", dtype="float32", deepspeed=config)
    attach(model, SubspaceConfig(method="lora", rank=3)).train()
    engine = tiny.make_engine(model, config)
    tiny.train_step(engine, tiny.own_batch(0, world().rank, world().size))
    frozen = tiny.frozen_parameters(model)
    found = (resident_bytes(frozen.values()), tiny.shard_bytes(frozen, world().size), tiny.whole_bytes(frozen))
    engine.destroy()
    return found


def test_deepspeeds_own_persistence_threshold_would_keep_every_weight_whole(models: dict[str, str]) -> None:
    """The proof that the check of resident bytes sees weights that stay: with 1e5 elements, all of a small model do."""
    for resident, shards, whole in run_on_ranks(2, resident_after_a_step, models["llama"], 100_000):
        assert resident > shards
        assert resident >= whole
    for resident, shards, _ in run_on_ranks(2, resident_after_a_step, models["llama"], 0):
        assert resident == shards


# Small pieces.


def placed_once() -> dict[str, Any]:
    partitioner = Partitioner(tiny.ds_config(3))
    values = torch.arange(7, dtype=torch.uint8)
    parameter = nn.Parameter(values.clone(), requires_grad=False)
    partitioner.place(parameter)
    shard = parameter.ds_tensor.clone()  # type: ignore[attr-defined]
    partitioner.place(parameter)
    found = {"shard": shard.tolist(), "kept": kept_bytes(parameter), "numel": full_numel(parameter)}
    with rewritten([parameter]):
        parameter.data.fill_(9 + world().rank)
    with gathered([parameter]):
        found["rewritten"] = parameter.tolist()
    barrier()
    return found


def test_a_parameter_is_placed_as_the_ranks_own_slice_and_rewritten_by_rank_0() -> None:
    first, second = run_on_ranks(2, placed_once)
    assert first["shard"] == [0, 1, 2, 3] and second["shard"][:3] == [4, 5, 6]
    for rank in (first, second):
        assert rank["kept"] == 4 and rank["numel"] == 7
        assert rank["rewritten"] == [9] * 7


def test_blocks_are_the_entries_of_the_outermost_lists() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(inner[0]), inner]), "head": nn.Linear(2, 3)})
    assert blocks(model) == list(model["layers"])  # type: ignore[arg-type]
    model.requires_grad_(False)
    assert largest_block_numel(model) == 12
    next(blocks(model)[0].parameters()).requires_grad_(
        True
    )  # a trained parameter stays whole: not gathered with its block
    assert largest_block_numel(model) < 12
    assert largest_block_numel(nn.Linear(2, 2)) == 0
