"""Mixtures whose experts are modules in a list, of which a forward calls those that its tokens go to: ranks whose tokens go to
different experts neither wait for each other nor train anything else than one rank does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.families.experts import callers_of_experts
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.leaf_blocks import unmark_leaf_blocks
from dist_subspace.placement.tensors import gathered
from tests.matrix import tiny
from tests.placement.hf_trainer import arguments, forget_earlier_trainers, rows
from tests.ranks import run_on_ranks
from tests.tiny_models import ODD_VOCABULARY, tiny_config, tiny_model

EXPERTS, LENGTH = 5, 3
CODE = f"""
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, {EXPERTS}, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range({EXPERTS})])

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(dim=-1).topk(1)
        out = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            mine = (chosen[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, mine, self.experts[number](rows[mine]) * weights[mine])
        return out.view_as(x)

class Listed(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config)
        self.post_init()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the folder's own code, as Mixtral was before transformers stacked its experts."""
    path = tmp_path_factory.mktemp("listed")
    tiny_config("LlamaConfig", vocab_size=ODD_VOCABULARY).save_pretrained(path)
    (path / "modeling_listed.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["Listed"], "auto_map": {"AutoModelForCausalLM": "modeling_listed.Listed"}}
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    read = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(read, trust_remote_code=True)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def trained(folder: str, storage: str, stage: int, way: str) -> dict[str, Any]:
    config = tiny.ds_config(stage, trainable_numel=1, world_size=world().size)
    config["train_micro_batch_size_per_gpu"] = tiny.BATCH // 2 // world().size
    config["train_batch_size"] = tiny.BATCH // 2
    model = dsub.load_frozen(folder, storage, dtype="float32", deepspeed=config, trust_remote_code=True)
    targets = {"target_modules": ["q_proj"]} if way == "frozen experts" else {"target_modules": "all-linear"}
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2, **targets)).train()
    if way != "leaves":
        unmark_leaf_blocks(model)
    hit: list[list[int]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: hit.append([]))
        for number, expert in enumerate(layer.mlp.experts):
            expert.register_forward_pre_hook(lambda *_, number=number: hit[-1].append(number))
    engine = tiny.make_engine(model, config)
    share = tiny.BATCH // 2 // world().size
    own = slice(world().rank * share, (world().rank + 1) * share)
    batches = [tiny.global_batch(step)[: tiny.BATCH // 2, :LENGTH][own] for step in range(tiny.STEPS)]
    losses = [tiny.train_step(engine, batch) for batch in batches]
    with gathered(dsub.trainable_parameters(model)):
        adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    engine.destroy()
    return {"losses": losses, "hit": hit, "adapter": adapter}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("storage", "stage", "way"),
    [
        ("nf4", 3, "leaves"),
        ("nf4", 3, "no leaves"),
        ("int8", 3, "frozen experts"),
        ("nf4", 2, "frozen experts"),
        ("fp32", 0, "leaves"),
    ],
)
def test_ranks_whose_tokens_go_to_different_listed_experts_train_what_one_rank_trains(
    folder: str, storage: str, stage: int, way: str
) -> None:
    (alone,) = run_on_ranks(1, trained, folder, storage, 0, "frozen experts" if way == "frozen experts" else "leaves")
    ranks = run_on_ranks(2, trained, folder, storage, stage, way, timeout=60)
    calls = list(zip(*(facts["hit"] for facts in ranks), strict=True))
    assert any(set(one) - set(other) for one, other in calls), "an expert has tokens on one rank alone"
    assert any(len(set(one) | set(other)) < EXPERTS for one, other in calls), "and another has none at all"
    for step, loss in enumerate(alone["losses"]):
        assert sum(facts["losses"][step] for facts in ranks) / 2 == pytest.approx(loss, rel=1e-5)
    for facts in ranks:
        for name, tensor in alone["adapter"].items():
            torch.testing.assert_close(facts["adapter"][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_add_up_gradients_as_they_come_are_refused_for_adapters_on_listed_experts(
    folder: str, stage: int
) -> None:
    said = run_on_ranks(2, refused, folder, stage, timeout=60)
    assert len(set(said)) == 1 and f"ZeRO stage {stage}" in said[0] and "zero3" in said[0] and "\n" not in said[0]


def refused(folder: str, stage: int) -> str:
    with pytest.raises(UsageError) as raised:
        trained(folder, "nf4", stage, "leaves")
    return str(raised.value)


def under_the_trainer(folder: str, out: str, stage: int, targets: list[str] | str) -> str:
    """What becomes of a training by transformers' own loop, which makes its engine itself."""
    from transformers import Trainer

    forget_earlier_trainers()
    model = dsub.load_frozen(folder, "nf4", dtype="float32", trust_remote_code=True)
    dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2, target_modules=targets))
    trainer = Trainer(model=model, args=arguments(out, stage, False), train_dataset=rows())  # type: ignore[arg-type]
    try:
        trainer.train()
    except UsageError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("stage", [1, 2])
def test_transformers_trainer_is_refused_the_same(folder: str, tmp_path: Path, stage: int) -> None:
    said = run_on_ranks(2, under_the_trainer, folder, str(tmp_path), stage, "all-linear", timeout=60)
    assert len(set(said)) == 1 and "ZeRO stage 1 or 2 would add up" in said[0] and "\n" not in said[0], said


@pytest.mark.parametrize(("stage", "targets"), [(2, ["q_proj"]), (3, "all-linear")])
def test_transformers_trainer_trains_what_is_right(folder: str, tmp_path: Path, stage: int, targets: list[str]) -> None:
    assert run_on_ranks(2, under_the_trainer, folder, str(tmp_path), stage, targets, timeout=60) == ["trained"] * 2


def test_what_calls_listed_experts_is_found() -> None:
    switch = tiny_model("SwitchTransformersForConditionalGeneration", config_name="SwitchTransformersConfig", **SWITCH)
    found = callers_of_experts(switch)
    assert found and {type(module).__name__ for module in found} == {"SwitchTransformersExperts"}
    owner = nn.Module()
    owner.experts = nn.ModuleList([nn.Linear(2, 2)])
    outer = nn.Sequential(owner)
    assert callers_of_experts(outer) == [owner]


SWITCH = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4, "num_experts": 4}
