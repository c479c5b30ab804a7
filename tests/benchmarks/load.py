"""What a load costs: seconds, memory of a rank, bytes read; ours beside transformers with DeepSpeed, ZeRO-3, on CPUs.

    python -m tests.benchmarks.load [--parameters 1.26e9] [--ranks 1 2 4] [--ways ours-nf4 theirs-nf4 ...] [--repeats 1]

A random LLaMA in bfloat16 is written file by file, and each way loads it in fresh processes, one way after the other, in turns.
Memory is anonymous (`RssAnon`), above what the process held after its imports, of the largest rank: "peak" within the load,
"kept" after it. "theirs" is `from_pretrained` under `HfDeepSpeedConfig`, without `deepspeed.initialize`: in 4 bits transformers
leaves the splitting to that, and its "shard" is the whole. It maps its files; what it reads of them is not counted, and shown as
"all", and a tensor that needs no other type stays in the file's pages, which "mapped" shows and no other column.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.random_checkpoint import config_of, write_checkpoint
from tests.ranks import free_port, rank_environment

WAYS = ("ours-nf4", "theirs-nf4", "ours-bf16", "theirs-bf16", "ours-int8")
MIB = 2**20
SAMPLED = 0.004  # seconds between two looks at the memory


def anonymous(kind: str = "RssAnon") -> int:
    """Bytes of anonymous memory of this process; with `RssFile` those of files that it has mapped and seen."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The most anonymous memory within the block."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLED):
            self.bytes = max(self.bytes, anonymous())


def ours(folder: str, storage: str) -> Any:
    import dist_subspace as dsub
    from dist_subspace.placement.deepspeed.presets import deepspeed_config

    world = int(os.environ["WORLD_SIZE"])
    config = deepspeed_config("zero3", micro_batch=1, rounds=1, world_size=world, max_grad_norm=0.0)
    return dsub.load_frozen(folder, storage, double_quant=True, dtype="bfloat16", deepspeed=config)


def theirs(folder: str, storage: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    world = int(os.environ["WORLD_SIZE"])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    held = HfDeepSpeedConfig({"zero_optimization": zero, "train_batch_size": world, "bf16": {"enabled": True}})
    given: dict[str, Any] = {}
    if storage == "nf4":
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **given)
    model.benchmark_config = held
    return model


def worker(way: str, folder: str) -> None:
    """One rank: load, and print one line of JSON."""
    import bitsandbytes  # noqa: F401
    import deepspeed
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import dist_subspace.placement.deepspeed.partitioner  # noqa: F401

    deepspeed.init_distributed("gloo", verbose=False)
    torch.distributed.barrier()
    who, storage = way.split("-")
    gc.collect()
    before, mapped, began = anonymous(), anonymous("RssFile"), time.perf_counter()
    with Peak() as peak:
        model = (ours if who == "ours" else theirs)(folder, storage)
        seconds = time.perf_counter() - began
    gc.collect()
    kept, mapped = anonymous() - before, anonymous("RssFile") - mapped
    shard = sum(t.numel() * t.element_size() for t in {getattr(p, "ds_tensor", p) for p in model.parameters()})
    read = None
    if who == "ours":
        from dist_subspace.loading.load import bytes_read

        read = bytes_read(model)
    found = {"seconds": seconds, "peak": peak.bytes - before, "kept": kept, "mapped": mapped, "shard": shard}
    print("MEASURED", json.dumps(found | {"read": read}), flush=True)
    torch.distributed.barrier()


def measure(way: str, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank says of one load in fresh processes."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.load", "--worker", way, "--folder", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    try:
        for process in processes:
            output, _ = process.communicate()
            line = next((text for text in output.splitlines() if text.startswith("MEASURED ")), None)
            if line is None:
                raise SystemExit(f"{way} on {ranks} ranks:\n{output[-3000:]}")
            found.append(json.loads(line.removeprefix("MEASURED ")))
    finally:
        for process in processes:
            process.kill()
    return found


def _seconds(load: list[dict[str, Any]]) -> str:
    return f"{max(rank['seconds'] for rank in load):.1f} s, {max(rank['peak'] for rank in load) / MIB:.0f} MiB"


def row(way: str, ranks: int, loads: list[list[dict[str, Any]]], checkpoint: int, largest: int) -> str:
    """A line of the table: medians over the loads of the largest rank."""
    seconds, peak, kept, mapped, shard = (
        statistics.median(max(rank[key] for rank in load) for load in loads)
        for key in ("seconds", "peak", "kept", "mapped", "shard")
    )
    read = [sum(rank["read"] for rank in load) for load in loads if load[0]["read"] is not None]
    times = f"{statistics.median(read) / checkpoint:.3f}" if read else "all"
    bounds = 1.25 * (shard + largest / ranks + 64 * MIB), 1.1 * shard + 32 * MIB
    return (
        f"{way:<12}{ranks:>6}{seconds:>10.1f}{shard / MIB:>9.0f}{peak / MIB:>8.0f}{peak / bounds[0]:>9.2f}{kept / MIB:>8.0f}"
        f"{kept / bounds[1]:>9.2f}{mapped / MIB:>8.0f}{times:>9}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.26e9)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", help="where the checkpoint lies, or is written; a temporary one if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as own:
        folder = Path(arguments.folder or own)
        config = config_of(arguments.parameters, arguments.vocabulary)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            size = int(json.loads(index.read_text())["metadata"]["total_size"])
        else:
            size = write_checkpoint(folder, config)
        largest = 2 * config.vocab_size * config.hidden_size
        print(
            f"{size / 2:,.0f} parameters, {size / MIB:,.0f} MiB in bfloat16; MiB of the largest rank, above its imports\n"
            f"{'':<12}{'ranks':>6}{'seconds':>10}{'shard':>9}{'peak':>8}{'/target':>9}{'kept':>8}{'/target':>9}"
            f"{'mapped':>8}{'x read':>9}",
            flush=True,
        )
        for ranks in arguments.ranks:
            loads: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in arguments.ways}
            for _ in range(arguments.repeats):
                for way in arguments.ways:
                    loads[way].append(measure(way, folder, ranks))
                    print(f"{way} on {ranks} ranks: {_seconds(loads[way][-1])}", file=sys.stderr, flush=True)
            for way in arguments.ways:
                print(row(way, ranks, loads[way], size, largest), flush=True)


if __name__ == "__main__":
    main()
