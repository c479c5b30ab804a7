"""Bytes that each rank and each node send in one optimizer step, counted on four ranks as two nodes of two, beside the formula.

python -m tests.benchmarks.traffic
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.placement.deepspeed.presets import PRESETS, deepspeed_config
from dist_subspace.placement.engines import IN_PIECES, LOOKED_UP
from dist_subspace.placement.tensors import full_numel
from dist_subspace.placement.traffic import Sent, Sizes, Traffic, Unit, sizes_of, step_traffic
from dist_subspace.subspace import parameter_groups, trainable_parameters
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss
from tests.matrix import tiny
from tests.ranks import close_pools, run_on_ranks
from tests.sent_bytes import Message, recorded
from tests.tiny_models import save_odd

RANKS, NODE = 4, 2
CONTROL = 64  # bytes of a message that carries a number or two
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "off": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def measured(
    folder: str, preset: str, checkpointing: str, rounds: int, storage: str, ids: Tensor | None = None
) -> tuple[dict[str, Any], ...]:
    """(counted, by the formula, sizes and other messages) of the fourth step.

    ids: `(ranks, t)`, a row a rank, all of them different tokens.
    """
    size = world().size
    numbers = {"micro_batch": 1, "rounds": rounds, "world_size": size, "max_grad_norm": 1.0, "ranks_per_node": NODE}
    model = load_frozen(folder, storage=storage, dtype="float32", deepspeed=deepspeed_config(preset, **numbers))  # type: ignore[arg-type]
    attach(model, SubspaceConfig(method="lora", rank=3)).train()
    how = CHECKPOINTING[checkpointing]
    if how is not None:
        model.gradient_checkpointing_enable(how)  # type: ignore[operator]
    sizes = sizes_of(model, [group["params"] for group in parameter_groups(model, tiny.RATE)])
    numbers["trainable_numel"] = sum(map(full_numel, trainable_parameters(model)))
    config = deepspeed_config(preset, **numbers, block_numel=largest_block_numel(model))  # type: ignore[arg-type]
    engine = tiny.make_engine(model, config, lambda p, lr: tiny.adam(parameter_groups(model, lr), lr))
    own = tiny.own_batch(0, world().rank, size) if ids is None else ids[world().rank : world().rank + 1]
    batch = MicroBatch(0, {"input_ids": own}, own, own[:, 1:].numel(), len(own), own.numel())
    for _ in range(4):
        with recorded() as messages:
            for _ in range(rounds):
                engine.backward(micro_batch_loss(engine, batch, torch.device("cpu")))
                engine.step()
    engine.destroy()
    formula = step_traffic(
        sizes, PRESETS[preset], size, NODE, second_shards=preset == "zero3-hpz", rounds=rounds, tokens=own.numel()
    )
    numbers = [m.payload <= CONTROL or m.dtype == torch.long for m in messages]
    large = [message for message, is_number in zip(messages, numbers, strict=True) if not is_number]
    small = [message.payload for message, is_number in zip(messages, numbers, strict=True) if is_number]
    others = {"small": small, "frozen": sizes.frozen_bytes}
    return asdict(counted(large)), asdict(formula), others | {"messages": len(large)}


def counted(messages: list[Message]) -> Traffic:
    """What a rank and its node have sent; the gather of the trained parameters is the last message of a step."""
    trained = messages[-1:] if messages[-1].kind == "gather" else []
    weights = [m for m in messages[: len(messages) - len(trained)] if m.kind in ("gather", "exchange")]
    gradients = [m for m in messages if m.kind not in ("gather", "exchange")]
    return Traffic(*(_sent(part) for part in (weights, gradients, trained)))


def _sent(messages: list[Message]) -> Sent:
    return Sent(sum(m.sent for m in messages), sum(m.sent for m in messages if m.crosses(NODE)))


PARTS = ("weights", "gradients", "trained")


# The example of docs/cluster.md: Llama 3.3 70B in NF4, doubly quantised, on two nodes of eight; LoRA of rank 16 everywhere.
WIDTH, INNER, KEYS, LAYERS, WORDS = 8192, 28_672, 1024, 80, 128_256
TOKENS = 2048  # of a micro-batch
LINEAR = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), *[(WIDTH, INNER)] * 2, (INNER, WIDTH)]


def seventy_billion(rank: int = 16) -> Sizes:
    held = [
        numel for d_in, d_out in LINEAR for numel in (d_in * d_out // 2, d_in * d_out // 64)
    ]  # codes, their magnitudes
    nested = [(d_in * d_out // 64 // 256, 4) for d_in, d_out in LINEAR]
    block = Unit((*((numel, 1) for numel in held), *nested, (WIDTH, 2), (WIDTH, 2)))
    embedding, norm, head = (
        Unit(((WORDS * WIDTH, 2),), in_backward=False, use=LOOKED_UP, width=WIDTH),
        Unit(((WIDTH, 2),)),
        Unit(((WORDS * WIDTH, 2),), in_backward=False, use=IN_PIECES, width=WIDTH),
    )
    trained = tuple(numel for d_in, d_out in LINEAR for numel in (rank * d_in, rank * d_out)) * LAYERS
    return Sizes((embedding, *[block] * LAYERS, norm, head), (trained,))


def example() -> list[str]:
    """The rows of the table."""
    rows = []
    for preset in ("zero2", "zero3", "zero3-hpz"):
        for rounds in (1, 8):
            near = preset == "zero3-hpz"
            how = {"second_shards": near, "rounds": rounds, "tokens": TOKENS}
            sent = step_traffic(seventy_billion(), PRESETS[preset], 16, 8, **how).total
            seconds = " | ".join(f"{8 * sent.by_node / rate / 1e9:,.2f}" for rate in (1, 10, 100))
            rows.append(f"| `{preset}` | {rounds} | {sent.by_node / 1e9:,.2f} | {seconds} |")
    return rows


def row(folder: str, preset: str, checkpointing: str, rounds: int) -> str:
    ranks = run_on_ranks(RANKS, measured, folder, preset, checkpointing, rounds, "nf4")
    (found, formula, _), exact = ranks[0], all(counted == by_formula for counted, by_formula, _ in ranks)
    sent = "".join(f"{found[part]['by_rank']:>11,}" for part in PARTS)
    away = f"{sum(found[part]['by_node'] for part in PARTS):>16,}"
    by_formula = f"{sum(formula[part]['by_node'] for part in PARTS):>12,}"
    return f"{preset:<11}{checkpointing:<15}{rounds:>6}{sent}{away}{by_formula}{'  equal' if exact else '  ANOTHER'}"


def main(layers: int = 6) -> None:
    presets = ("zero0", "zero1", "zero2", "zero3", "zero3-hpz")
    with tempfile.TemporaryDirectory() as own:
        folder = save_odd(Path(own), "llama", layers)
        frozen = run_on_ranks(RANKS, measured, folder, "zero3", "off", 1, "nf4")[0][2]["frozen"]
        print(
            f"{frozen:,} frozen bytes; in one step each rank sends by part, and each node to the other, counted and by formula"
        )
        columns = "".join(f"{part:>11}" for part in PARTS)
        print(f"{'preset':<11}{'checkpointing':<15}{'rounds':>6}{columns}{'to other nodes':>16}{'formula':>12}")
        for preset in presets:
            for checkpointing in CHECKPOINTING if preset >= "zero3" else ("off",):
                for rounds in (1, 4):
                    print(row(folder, preset, checkpointing, rounds), flush=True)
    close_pools()


if __name__ == "__main__":
    main()
