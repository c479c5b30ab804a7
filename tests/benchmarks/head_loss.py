"""Memory and time of a training step with a large vocabulary: our loop's loss, against PEFT's LoRA with transformers' loss.

    python -m tests.benchmarks.head_loss [--vocabulary 131072] [--length 512] [--tied] [--threads 2] [--rounds 3]

The model is a random LLaMA in bfloat16 (hidden 1024, 6 layers), two rows, every token a target, LoRA on every linear layer of its
blocks, one process a side, no activation checkpointing. Each side runs in processes of its own, in turns (A B B A ...). Peaks are
the kernel's (`VmHWM`, set back after the model is there), above what the imports took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDES = ("ours", "peft")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIB = 2**20


def memory(what: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def llama(vocabulary: int, length: int, tied: bool, layers: int = 6) -> nn.Module:
    from transformers import LlamaForCausalLM

    from tests.tiny_models import tiny_config

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = tiny_config(
        "LlamaConfig",
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    return model


def ours(base: nn.Module, ids: Tensor) -> tuple[nn.Module, Any]:
    import dist_subspace as dsub
    from dist_subspace.training.data import MicroBatch
    from dist_subspace.training.loss import micro_batch_loss

    model = dsub.attach(base, dsub.SubspaceConfig(method="lora", rank=8, alpha=16, target_modules=LINEARS)).train()
    targets = ids.shape[0] * (ids.shape[1] - 1)
    batch = MicroBatch(0, {"input_ids": ids}, ids, targets, len(ids), ids.numel())
    return model, lambda: micro_batch_loss(model, batch, torch.device("cpu")) / targets


def theirs(base: nn.Module, ids: Tensor) -> tuple[nn.Module, Any]:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def one_side(side: str, vocabulary: int, length: int, tied: bool) -> dict[str, float]:
    import peft  # noqa: F401

    import dist_subspace  # noqa: F401

    imports = memory("VmRSS")
    base = llama(vocabulary, length, tied)
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))
    model, loss_of = (ours if side == "ours" else theirs)(base, ids)
    resident = memory("VmRSS") - imports
    forget_peak()
    seconds, busy = [], []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        start, used = time.perf_counter(), time.process_time()
        loss = loss_of()
        loss.backward()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    peak = memory("VmHWM") - imports
    times = {"seconds": min(seconds), "busy": min(busy)}
    return {"resident": resident, "peak": peak, "loss": float(loss.detach())} | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(one_side(arguments.side, arguments.vocabulary, arguments.length, arguments.tied)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, "-m", "tests.benchmarks.head_loss", *sys.argv[1:], "--side", side]
            environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    print("| side | model MiB | step peak MiB | seconds a step | of a processor | loss |\n|---|---|---|---|---|---|")
    middle = {s: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for s, rounds in found.items()}
    for side, row in middle.items():
        sizes = f"{row['resident'] / MIB:.0f} | {row['peak'] / MIB:.0f}"
        print(f"| {side} | {sizes} | {row['seconds']:.2f} | {row['busy']:.2f} | {row['loss']:.5f} |")
    print(
        ", ".join(f"{what} {middle['ours'][what] / middle['peft'][what]:.2f}" for what in ("peak", "busy")), "of PEFT's"
    )


if __name__ == "__main__":
    main()
