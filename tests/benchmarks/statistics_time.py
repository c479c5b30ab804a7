"""What set-up statistics cost: seconds, peak memory, and a second start that finds them.

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 -m tests.benchmarks.statistics_time [--methods pissa ...] [--hidden 1024]

A random LLaMA in NF4, split by ZeRO-3 where there is more than one rank. "peak" is the largest rank's resident memory above
what it held before and the factors that it keeps, in float32 copies of the largest decomposed matrix.
"""

from __future__ import annotations

import argparse
import gc
import re
import tempfile
import time
from pathlib import Path

import torch

import dist_subspace as dsub
from dist_subspace.placement.collectives import barrier, max_over_ranks, world
from dist_subspace.placement.deepspeed.presets import deepspeed_config
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.deepspeed.quiet import be_quiet
from dist_subspace.placement.tensors import kept_bytes


def save_model(folder: Path, hidden: int, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def resident(what: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` the most since `forget_peak`."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def frozen_bytes(model: torch.nn.Module) -> int:
    """What this rank keeps of everything that is frozen."""
    return sum(kept_bytes(p) for p in model.parameters() if not p.requires_grad)


def start(folder: Path, method: str, rank: int, cache: Path) -> tuple[float, float]:
    """Collective: seconds, and peak bytes above the loaded model, of one attach."""
    stage = 3 if world().size > 1 else 0
    config = deepspeed_config(f"zero{stage}", micro_batch=1, rounds=1, world_size=world().size, max_grad_norm=0.0)
    model = dsub.load_frozen(folder, storage="nf4", deepspeed=config, dtype="bfloat16", device="cpu")
    gc.collect()
    frozen = frozen_bytes(model)
    before = resident("VmRSS")
    forget_peak()
    barrier()
    began = time.perf_counter()
    dsub.attach(model, dsub.SubspaceConfig(method=method, rank=rank), cache=cache)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before - (frozen_bytes(model) - frozen)
    del model
    gc.collect()
    return max_over_ranks(seconds), max_over_ranks(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="*", default=["dora", "pissa", "olora", "milora", "spectral-additive", "sam-parser"]
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    be_quiet()
    ensure_process_group()
    shared = [tempfile.mkdtemp() if world().is_main else ""]
    torch.distributed.broadcast_object_list(shared, src=0)
    folder = Path(shared[0])
    if world().is_main:
        save_model(folder / "model", arguments.hidden, arguments.layers)
        print(
            f"{world().size} ranks, {7 * arguments.layers} layers, the largest {arguments.hidden} x {arguments.hidden * 11 // 4}"
        )
    barrier()
    unit = 4 * arguments.hidden * (arguments.hidden * 11 // 4)
    for method in arguments.methods:
        made = start(folder / "model", method, 16, folder / method)
        found = start(folder / "model", method, 16, folder / method)
        if world().is_main:
            print(
                f"{method:<20} made in {made[0]:6.2f} s, peak {made[1] / unit:5.2f} copies; "
                f"found in {found[0]:6.2f} s, peak {found[1] / unit:5.2f} copies",
                flush=True,
            )


if __name__ == "__main__":
    main()
