"""A step of ZeRO-3 on two ranks with a large vocabulary: table and head gathered whole, and used where they lie.

    python -m tests.benchmarks.tables_in_place [--vocabulary 131072] [--length 512] [--layers 2]

The model is a random LLaMA in bfloat16 (hidden 1024, untied), two rows of every rank's own, LoRA on every linear layer of its
blocks, activation checkpointing. Peaks are the kernel's (`VmHWM`, set back before the steps), above what a rank keeps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed import in_place
from dist_subspace.placement.deepspeed.leaf_blocks import largest_block_numel
from dist_subspace.placement.deepspeed.presets import deepspeed_config
from dist_subspace.placement.tensors import full_numel
from dist_subspace.subspace import trainable_parameters
from dist_subspace.training.data import MicroBatch
from dist_subspace.training.loss import micro_batch_loss
from tests.benchmarks.head_loss import LINEARS, MIB, forget_peak, llama, memory
from tests.matrix import tiny
from tests.ranks import close_pools, run_on_ranks
from tests.sent_bytes import recorded

CPU = torch.device("cpu")


def steps(folder: str, length: int, whole: bool) -> dict[str, float]:
    """Of a rank: bytes at the peak of a step above those before it, bytes sent in a step, seconds, the last loss."""
    before = (in_place.LOOKED_UP_FROM, in_place.IN_PIECES_FROM)
    if whole:
        in_place.LOOKED_UP_FROM = in_place.IN_PIECES_FROM = 1 << 62
    try:
        return _steps(folder, length)
    finally:
        in_place.LOOKED_UP_FROM, in_place.IN_PIECES_FROM = before


def _steps(folder: str, length: int) -> dict[str, float]:
    numbers: dict[str, Any] = {"micro_batch": 2, "rounds": 1, "world_size": world().size, "max_grad_norm": 1.0}
    model = load_frozen(folder, storage="bf16", deepspeed=deepspeed_config("zero3", **numbers))
    attach(model, SubspaceConfig(method="lora", rank=8, alpha=16, target_modules=LINEARS)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    numbers["trainable_numel"] = sum(map(full_numel, trainable_parameters(model)))
    engine = tiny.make_engine(model, deepspeed_config("zero3", **numbers, block_numel=largest_block_numel(model)))
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(world().rank))
    batch = MicroBatch(0, {"input_ids": ids}, ids, 2 * (length - 1), 2, ids.numel())
    seconds, peaks, sent = [], [], 0
    for _ in range(5):
        held = memory("VmRSS")
        forget_peak()
        start = time.perf_counter()
        with recorded() as messages:
            loss = micro_batch_loss(engine, batch, CPU) / batch.targets
            engine.backward(loss)
            engine.step()
        seconds.append(time.perf_counter() - start)
        peaks.append(memory("VmHWM") - held)
        sent = sum(message.sent for message in messages)
    engine.destroy()
    return {"peak": max(peaks[2:]), "sent": sent, "seconds": min(seconds), "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        model = llama(arguments.vocabulary, arguments.length, tied=False, layers=arguments.layers)
        model.save_pretrained(Path(own))  # type: ignore[operator]
        del model
        print(
            "| table and head | step peak MiB of a rank | MiB sent of a rank | seconds a step | loss |\n|---|---|---|---|---|"
        )
        for whole in (True, False):
            ranks = run_on_ranks(2, steps, own, arguments.length, whole)
            worst = {key: max(rank[key] for rank in ranks) for key in ("peak", "sent", "seconds")}
            loss = sum(rank["loss"] for rank in ranks) / len(ranks)
            print(
                f"| {'gathered whole' if whole else 'where they lie'} | {worst['peak'] / MIB:.0f} | {worst['sent'] / MIB:.0f} "
                f"| {worst['seconds']:.2f} | {loss:.5f} |",
                flush=True,
            )
    close_pools()


if __name__ == "__main__":
    main()
