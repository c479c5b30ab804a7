"""Mixtures of experts under ZeRO: stacks split like every other weight, and experts that get no token on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.leaf_blocks import unmark_leaf_blocks
from dist_subspace.placement.tensors import full_numel, gathered, resident_bytes
from dist_subspace.storage import FrozenStack
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import ODD_VOCABULARY, tiny_model

EXPERTS = 5
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
LENGTH = 3  # as few tokens a rank as leave experts without any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mixture") / "model"
    changes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    tiny_model("MixtralForCausalLM", config_name="MixtralConfig", vocab_size=ODD_VOCABULARY, **changes).save_pretrained(
        path
    )
    return str(path)


def own_batch(step: int) -> torch.Tensor:
    share = tiny.BATCH // 2 // world().size
    rows = tiny.global_batch(step)[: tiny.BATCH // 2, :LENGTH]
    return rows[world().rank * share : (world().rank + 1) * share]


class Tokens:
    """The experts that had tokens, call by call, and the largest sum of frozen bytes on this rank."""

    def __init__(self, model: nn.Module) -> None:
        self.hit: list[list[int]] = []
        self.frozen = list(tiny.frozen_parameters(model).values())
        self.peak = 0
        for module in model.modules():
            if isinstance(module, FrozenStack):
                module.register_forward_pre_hook(self.look)

    def look(self, stack: FrozenStack, given: tuple[Any, ...]) -> None:
        assert all(p.numel() == full_numel(p) for p in stack.parameters())
        self.hit.append([number for number, count in enumerate(given[1]) if count])
        self.peak = max(self.peak, resident_bytes(self.frozen))


def trained(folder: str, storage: str, stage: int, way: str) -> dict[str, Any]:
    config = tiny.ds_config(stage, trainable_numel=1, world_size=world().size)
    config["train_micro_batch_size_per_gpu"] = tiny.BATCH // 2 // world().size
    config["train_batch_size"] = tiny.BATCH // 2
    model = dsub.load_frozen(folder, storage=storage, dtype="float32", deepspeed=config)
    split = {name: p.dtype for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}
    on_experts = METHODS.get(way)
    targets = {"target_modules": ["q_proj", "v_proj"]} if on_experts is None else {"target_parameters": STACKS}
    dsub.attach(model, dsub.SubspaceConfig(**{"method": "lora", "rank": 2} | targets | (on_experts or {}))).train()
    if way == "no leaves":
        unmark_leaf_blocks(model)
    if way == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = Tokens(model)
    engine = tiny.make_engine(model, config)
    losses = [tiny.train_step(engine, own_batch(step)) for step in range(tiny.STEPS)]
    kept = resident_bytes(tokens.frozen)
    with gathered(dsub.trainable_parameters(model)):
        adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    facts = {"losses": losses, "hit": tokens.hit, "adapter": adapter, "split": split, "kept": kept, "peak": tokens.peak}
    facts |= {"shards": tiny.shard_bytes(tiny.frozen_parameters(model), world().size)}
    facts |= {"whole": tiny.whole_bytes(tiny.frozen_parameters(model))}
    engine.destroy()
    return facts


# What is put on the experts themselves, by the way.
METHODS: dict[str, dict[str, Any]] = {
    "on experts": {},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa", "options": {"residual": "fold"}},
    "pissa stacked": {"method": "pissa"},
    "one pair": {"expert_parameters": "shared"},
}


@pytest.mark.parametrize(
    ("storage", "way"),
    [
        ("nf4", "leaves"),
        ("nf4", "no leaves"),
        ("nf4", "checkpointing"),
        ("int8", "on experts"),
        ("fp32", "on experts"),
        ("fp32", "leaves"),
        ("nf4", "dora"),
        ("nf4", "pissa"),
        ("int8", "pissa stacked"),
        ("nf4", "one pair"),
    ],
)
def test_ranks_whose_tokens_go_to_different_experts_train_what_one_rank_trains(
    folder: str, storage: str, way: str
) -> None:
    (alone,) = run_on_ranks(1, trained, folder, storage, 0, way if way in METHODS else "leaves")
    ranks = run_on_ranks(2, trained, folder, storage, 3, way)
    calls = list(zip(*(facts["hit"] for facts in ranks), strict=True))
    assert any(set(one) - set(other) for one, other in calls), "an expert has tokens on one rank alone"
    for step, loss in enumerate(alone["losses"]):
        assert sum(facts["losses"][step] for facts in ranks) / 2 == pytest.approx(loss, rel=1e-5)
    for facts in ranks:
        assert facts["split"] and facts["kept"] == facts["shards"] < 0.52 * facts["whole"]
        assert facts["peak"] < facts["whole"], "never the whole model"
        assert any(name.endswith(("experts.down_proj.codes", "experts.down_proj.weight")) for name in facts["split"])
        for name, tensor in alone["adapter"].items():
            torch.testing.assert_close(facts["adapter"][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_split_stack_holds_its_share_of_the_packed_bytes(folder: str) -> None:
    for facts in run_on_ranks(2, stack_bytes, folder):
        for kept, whole in facts:
            assert kept == -(-whole // 2)


def stack_bytes(folder: str) -> list[tuple[int, int]]:
    model = dsub.load_frozen(folder, storage="nf4", deepspeed=tiny.ds_config(3, world_size=world().size))
    stacks = [module for module in model.modules() if isinstance(module, FrozenStack)]
    return [(resident_bytes([p]), full_numel(p) * p.element_size()) for stack in stacks for p in stack.parameters()]


def test_a_merge_of_split_stacks_is_that_of_whole_ones(folder: str, tmp_path: Path) -> None:
    run_on_ranks(1, merged, folder, str(tmp_path / "one"), 0)
    run_on_ranks(2, merged, folder, str(tmp_path / "two"), 3)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def merged(folder: str, out: str, stage: int) -> None:
    config = tiny.ds_config(stage, world_size=world().size)
    model = dsub.load_frozen(folder, storage="nf4", dtype="float32", deepspeed=config)
    pissa = {"method": "pissa", "options": {"residual": "fold"}}
    dsub.attach(model, dsub.SubspaceConfig(rank=2, target_parameters=STACKS, **pissa))
    dsub.merge(model, out, report=None)


def test_every_stage_trains_what_stage_0_trains_on_experts(folder: str) -> None:
    runs = {stage: run_on_ranks(2, trained, folder, "nf4", stage, "dora")[0] for stage in (0, 1, 2)}
    for stage in (1, 2):
        assert runs[stage]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-5)
        for name, tensor in runs[0]["adapter"].items():
            torch.testing.assert_close(runs[stage]["adapter"][name], tensor, rtol=1e-4, atol=1e-6)
