"""Virtual tokens on split models: the same values and losses on two ranks under ZeRO-3 as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_adapter, load_frozen, save_adapter, trainable_parameters
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import full_numel, gathered
from dist_subspace.subspace import named_trainables
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

CASES: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix-projection": {"projection": True, "projection_dim": 5},
    "prompt": {},
    "p-tuning": {"encoder": "mlp"},
    "p-tuning-lstm": {"encoder": "lstm", "hidden": 5},
}
RUNS = [  # case, family, reentrant checkpointing
    ("prefix", "llama", False),
    ("prefix", "gpt2", True),
    ("prefix-projection", "llama", True),
    ("prefix-projection", "gpt2", False),
    ("prompt", "gpt2", False),
    ("p-tuning", "llama", False),
    ("p-tuning-lstm", "llama", True),
]


def sgd(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Steps as large as the gradients are, so that rounding is not made more of than it is."""
    return torch.optim.SGD(parameters, lr=0.5)


def subspace(case: str) -> SubspaceConfig:
    method = case.removesuffix("-projection").removesuffix("-lstm")
    return SubspaceConfig(method=method, options={"num_virtual_tokens": 3, **CASES[case]}, seed=4)


def load(folder: Path, family: str, config: dict[str, Any] | None) -> Any:
    return load_frozen(folder / family, storage="fp32", deepspeed=config, device="cpu")


def whole(model: Any) -> dict[str, Tensor]:
    parameters = named_trainables(model)
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def train_on_ranks(folder: Path, cases: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """Three steps of each case at stage 3 with every threshold at 0; what this rank saw."""
    return [_train(folder, *case) for case in cases]


def _train(folder: Path, case: str, family: str, reentrant: bool) -> dict[str, Any]:
    rank, size = world().rank, world().size
    model = attach(load(folder, family, tiny.ds_config(3, world_size=size)), subspace(case))
    start = whole(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=trained, world_size=size), sgd)  # type: ignore[arg-type]
    engine.train()
    watch = tiny.Watch(model)
    losses = [tiny.train_step(engine, tiny.own_batch(step, rank, size)) for step in range(tiny.STEPS)]
    split = all(is_partitioned(p) for p in model.parameters())
    engine.eval()
    name = str(folder / f"adapter-{case}-{family}-{reentrant}")
    with torch.no_grad():
        logits = engine(input_ids=tiny.global_batch(9), use_cache=False).logits
        save_adapter(model, name)
        again = load_adapter(load(folder, family, None), name).eval()
        same = torch.equal(adapter_tensors(again)["prompt_embeddings"], adapter_tensors(model)["prompt_embeddings"])
        difference = float((again(input_ids=tiny.global_batch(9), use_cache=False).logits - logits).abs().max())
    end = whole(model)
    engine.destroy()
    return {"start": start, "losses": losses, "end": end, "split": split, "same": same, "again": difference} | {
        "broken": watch.broken
    }


def reference(folder: Path, case: str, family: str) -> tuple[dict[str, Tensor], list[list[float]], dict[str, Tensor]]:
    """The same in one process, without an engine or checkpointing: the loss of each row."""
    model = attach(load(folder, family, None), subspace(case)).train()
    start = whole(model)
    optimizer = sgd(trainable_parameters(model), tiny.RATE)
    losses = []
    for step in range(tiny.STEPS):
        ids = tiny.global_batch(step)
        rows = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in ids]
        optimizer.zero_grad()
        torch.stack(rows).mean().backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in rows])
    return start, losses, whole(model)


def test_virtual_tokens_train_on_two_ranks_under_zero_3_as_in_one_process(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        save_odd(tmp_path, family)
    ranks = run_on_ranks(2, train_on_ranks, tmp_path, RUNS)
    for number, (case, family, reentrant) in enumerate(RUNS):
        start, losses, end = reference(tmp_path, case, family)
        for rank, seen in enumerate(found[number] for found in ranks):
            what = f"{case} {family} reentrant={reentrant} rank {rank}"
            assert seen["split"] and seen["same"] and not seen["broken"], what
            assert seen["again"] < 1e-5, what
            assert all(torch.equal(seen["start"][name], start[name]) for name in start), what
            own = [sum(rows[2 * rank : 2 * rank + 2]) / 2 for rows in losses]
            assert seen["losses"] == pytest.approx(own, rel=1e-4), what
            for name, value in end.items():
                moved = value - start[name]
                assert moved.abs().max() > 0, f"{what} {name}"
                close = 1e-3 * float(moved.abs().max())
                torch.testing.assert_close(
                    seen["end"][name] - start[name], moved, rtol=0, atol=close, msg=f"{what} {name}"
                )
