"""Frozen embeddings are gathered for forward alone; what is counted of it is in tests/placement/test_traffic.py."""

from __future__ import annotations

import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gather_to
from dist_subspace.subspace import named_trainables
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd


def spared(folder: str, trained: bool) -> tuple[list[bool], list[str], list[str]]:
    """Of each embedding whether it is spared; names of trained ones of them, and of those that two steps did not move."""
    config = tiny.ds_config(3, world_size=world().size)
    model = load_frozen(folder, storage="nf4", dtype="float32", deepspeed=config)
    subspace = SubspaceConfig(method="lora", rank=3, modules_to_save=("embed_tokens",) if trained else ())
    model = attach(model, subspace).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    config["zero_optimization"]["reduce_bucket_size"] = 100_000
    engine = tiny.make_engine(model, config)
    names = {name: p for name, p in named_trainables(model).items() if "embed" in name}
    before = {name: gather_to(p, 0) for name, p in names.items()}
    for step in range(2):
        tiny.train_step(engine, tiny.own_batch(step, world().rank, world().size))
    after = {name: gather_to(p, 0) for name, p in names.items()}
    unmoved = [n for n, was in before.items() if was is not None and torch.equal(was, after[n])]  # type: ignore[arg-type]
    found = [
        module.pre_bwd_fn.__name__ == "_Nothing" for module in model.modules() if isinstance(module, torch.nn.Embedding)
    ]
    engine.destroy()
    return found, list(names), unmoved


def test_frozen_embeddings_alone_are_spared(tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = save_odd(tmp_path_factory.mktemp("models"), "llama")
    for found, names, _ in run_on_ranks(2, spared, folder, False):
        assert found == [True] and names == []
    for found, names, unmoved in run_on_ranks(2, spared, folder, True):
        assert False in found and names and unmoved == []
