"""The formula of the bytes that a recipe's rank holds, against what ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.config import load_config
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.optimizer_state import plain_optimizer
from dist_subspace.placement.deepspeed.presets import PRESETS
from tests.config.recipes import Sizes, held, sizes_of
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd, tiny_model

NODE = 2  # ranks of a node


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


def bytes_of_a_rank(folder: str, preset: str, storage: str) -> tuple[int, int, Sizes]:
    """After a step: bytes of what is frozen and of what is trained with its optimizer's state; and what the formula takes."""
    hierarchy = {"zero_hpz_partition_size": NODE} if preset.endswith("-hpz") else {}
    config = tiny.ds_config(PRESETS[preset], world_size=world().size, **hierarchy)
    model = load_frozen(folder, storage=storage, double_quant=True, dtype="bfloat16", deepspeed=config)
    attach(model, SubspaceConfig(method="lora", rank=4)).train()
    engine = tiny.make_engine(model, config)
    tiny.train_step(engine, tiny.own_batch(0, world().rank, world().size))
    frozen, trained = set[int](), set[int]()
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor, kind: set[int]) -> None:
        storage_of = tensor.untyped_storage()
        kind.add(storage_of.data_ptr())
        sizes[storage_of.data_ptr()] = storage_of.nbytes()

    for parameter in model.parameters():
        kind = trained if parameter.requires_grad else frozen
        shards = [getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor")]
        for tensor in (parameter.data, *shards):
            if tensor is not None and tensor.numel():
                keep(tensor, kind)
    for master, state in plain_optimizer(engine).state.items():
        for tensor in (master, *state.values()):
            if isinstance(tensor, Tensor) and tensor.numel() > 1:
                keep(tensor, trained)
    engine.destroy()
    del engine, model
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        asked: dict[str, Any] = {"model": {"path": folder, "storage": storage}, "subspace": {"rank": 4}}
        counted = sizes_of(plain, load_config(asked | {"data": {"train": "none.jsonl"}}))
    return sum(map(sizes.__getitem__, frozen)), sum(map(sizes.__getitem__, trained)), counted


CELLS = [(2, preset, storage) for preset in ("zero0", "zero1", "zero2", "zero3") for storage in ("bf16", "nf4", "int8")]


@pytest.mark.parametrize(
    ("ranks", "preset", "storage"),
    [*CELLS, *(pytest.param(4, "zero3-hpz", storage, marks=pytest.mark.slow) for storage in ("nf4", "int8"))],
)
def test_the_bytes_of_a_rank_are_what_ranks_hold(llama: str, ranks: int, preset: str, storage: str) -> None:
    """But for the padding of shards and of what ZeRO aligns."""
    for frozen, trained, sizes in run_on_ranks(ranks, bytes_of_a_rank, llama, preset, storage):
        expected = held(sizes, preset, ranks, NODE)
        assert frozen == pytest.approx(expected.weights + expected.node_weights, rel=0.02)
        assert trained == pytest.approx(expected.adapter, rel=0.02)


def test_the_bytes_of_a_mixtures_rank_are_what_ranks_hold(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY}
    tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes).save_pretrained(tmp_path)
    for frozen, trained, counted in run_on_ranks(2, bytes_of_a_rank, str(tmp_path), "zero3", "nf4"):
        expected = held(counted, "zero3", 2, NODE)
        assert frozen == pytest.approx(expected.weights, rel=0.02)
        assert trained == pytest.approx(expected.adapter, rel=0.02)
