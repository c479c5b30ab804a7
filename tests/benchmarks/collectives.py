"""Collectives and bytes of one training step under ZeRO-3, decoder blocks as leaf modules or not, checkpointing on or off.

torchrun --nproc_per_node 2 -m tests.benchmarks.collectives
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import broadcast_object, world
from dist_subspace.placement.deepspeed.leaf_blocks import unmark_leaf_blocks
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.deepspeed.quiet import be_quiet
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import named_trainables, trainable_parameters
from tests.matrix import tiny
from tests.tiny_models import save_odd

GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_reduce_coalesced", "broadcast")
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "off": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


@dataclass
class Traffic:
    """Calls of DeepSpeed's communication backend on this rank, and bytes of the tensors that they fill."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, filled: Any) -> None:
        tensors = [filled] if isinstance(filled, Tensor) else [t for t in filled if isinstance(t, Tensor)]
        self.calls[name] = self.calls.get(name, 0) + 1
        self.bytes[name] = self.bytes.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)

    def total(self, names: tuple[str, ...]) -> tuple[int, int]:
        return sum(self.calls.get(n, 0) for n in names), sum(self.bytes.get(n, 0) for n in names)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what passes through DeepSpeed's backend object (`deepspeed.comm.comm.cdb`) within the block."""
    from deepspeed.comm import comm

    traffic, backend = Traffic(), comm.cdb
    for name in GATHERS + REDUCTIONS:
        setattr(backend, name, _counting(getattr(backend, name), name, traffic))
    try:
        yield traffic
    finally:
        for name in GATHERS + REDUCTIONS:
            delattr(backend, name)  # the class's own method is seen again


def _counting(function: Any, name: str, traffic: Traffic) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        filled = args[0] if args else next(kwargs[k] for k in ("output_tensor", "tensor", "output") if k in kwargs)
        traffic.add(name, filled)
        return function(*args, **kwargs)

    return call


@dataclass
class Measured:
    checkpointing: str
    leaf: bool
    gathers: int
    gathered_bytes: int
    reductions: int
    reduced_bytes: int
    frozen_bytes: int
    gradients: dict[str, Tensor]

    @property
    def times(self) -> float:
        """How many times over the frozen weights were gathered."""
        return self.gathered_bytes / self.frozen_bytes


def measure(folder: str, storage: str, checkpointing: str, leaf: bool) -> Measured:
    """Collective: one warm-up step, then one step counted, and the gradients of another before its optimizer step."""
    rank, size = world().rank, world().size
    model = load_frozen(folder, storage=storage, dtype=torch.float32, deepspeed=tiny.ds_config(3, world_size=size))
    attach(model, SubspaceConfig(method="lora", rank=3))
    if not leaf:
        unmark_leaf_blocks(model)
    how = CHECKPOINTING[checkpointing]
    if how is not None:
        model.gradient_checkpointing_enable(how)  # type: ignore[operator]
    trained = sum(full_numel(p) for p in trainable_parameters(model))
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=trained, world_size=size))
    engine.train()
    tiny.train_step(engine, tiny.own_batch(0, rank, size))
    with counted() as traffic:
        tiny.train_step(engine, tiny.own_batch(1, rank, size))
    gradients = _gradients(engine, tiny.own_batch(2, rank, size))
    frozen = tiny.whole_bytes(tiny.frozen_parameters(model))
    engine.destroy()
    return Measured(checkpointing, leaf, *traffic.total(GATHERS), *traffic.total(REDUCTIONS), frozen, gradients)


def _gradients(engine: Any, ids: Tensor) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    found = {name: safe_get_full_grad(p).clone() for name, p in named_trainables(engine.module).items()}
    engine.step()
    return found


def measure_all(folder: str, storage: str) -> list[Measured]:
    """Collective: every kind of checkpointing, with leaf modules and without."""
    return [measure(folder, storage, how, leaf) for how in CHECKPOINTING for leaf in (False, True)]


def table(rows: list[Measured], storage: str) -> str:
    lines = [
        f"storage {storage}, {world().size} ranks, {rows[0].frozen_bytes:,} frozen bytes in all; one step:",
        f"{'checkpointing':<15}{'leaf':>6}{'gathers':>9}{'bytes':>14}{'x frozen':>10}{'reductions':>12}{'bytes':>12}",
    ]
    for row in rows:
        lines.append(
            f"{row.checkpointing:<15}{'on' if row.leaf else 'off':>6}{row.gathers:>9}{row.gathered_bytes:>14,}"
            f"{row.times:>10.2f}{row.reductions:>12}{row.reduced_bytes:>12,}"
        )
    return "\n".join(lines)


def main(layers: int = 6) -> None:
    """Collective: measure and print the tables, on rank 0."""
    be_quiet()
    ensure_process_group()
    with tempfile.TemporaryDirectory() as own:
        shared = Path(broadcast_object(own))
        if world().is_main:
            save_odd(shared, "llama", layers)
        broadcast_object(None)  # the model is there
        for storage in ("fp32", "nf4", "int8"):
            rows = measure_all(str(shared / "llama"), storage)
            if world().is_main:
                print(table(rows, storage), flush=True)
        broadcast_object(None)


if __name__ == "__main__":
    main()
