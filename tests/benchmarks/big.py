"""A model that fills this machine: written file by file, then trained for a few steps under torchrun, with its peaks.

    python -m tests.benchmarks.big FOLDER [--shape dense | mixture] [--parameters 7e9] [--only-write]
                                   [--ranks 2] [--steps 3] [--storage nf4] [--max-length 128] [key=value ...]

The weights are random, in bfloat16, in files of 256 MiB with an index: a LLaMA (`dense`), or Qwen3-30B-A3B with fewer layers and
all its 128 experts (`mixture`), each expert's matrices by themselves in the file. A checkpoint that the folder holds is used.
Then `dist-subspace train` runs with the preset zero3 and LoRA, one thread a process, and what it prints goes through. At the
end: seconds until the first step began, seconds of each step, and for each rank the peak of its anonymous memory (`RssAnon`),
of all its memory (`VmHWM`), and of what all processes of the run had at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.benchmarks.random_checkpoint import config_of, mixture_of, write_checkpoint
from tests.ranks import free_port, outside_ranks
from tests.tiny_run import make_tokenizer

GIB = 2**30
SAMPLED = 0.1  # seconds between two looks at the memory
WORDS = (
    "the",
    "model",
    "reads",
    "its",
    "weights",
    "and",
    "splits",
    "them",
    "over",
    "all",
    "ranks",
    "then",
    "trains",
    "little",
)


def write(folder: Path, shape: str, parameters: float) -> None:
    """The checkpoint and its tokenizer; nothing where they are there already."""
    if (folder / "model.safetensors.index.json").exists():
        return
    began = time.perf_counter()
    size = write_checkpoint(folder, mixture_of(parameters) if shape == "mixture" else config_of(parameters))
    make_tokenizer().save_pretrained(folder)
    seconds = time.perf_counter() - began
    print(f"written: {size / 2:,.0f} parameters, {size / GIB:.1f} GiB in bfloat16, {seconds:.0f} s", flush=True)


def write_records(file: Path, count: int = 64) -> None:
    rows = [{"text": " ".join(WORDS[(n * 7 + k) % len(WORDS)] for k in range(200))} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(folder: Path, given: argparse.Namespace) -> list[str]:
    """The run, as overrides of an empty configuration."""
    return [
        f"model.path={folder}",
        f"model.storage={given.storage}",
        "model.dtype=bfloat16",
        "subspace.method=lora",
        "subspace.rank=8",
        f"data.train={folder / 'big-train.jsonl'}",
        "data.format=text",
        f"data.max_length={given.max_length}",
        f"training.max_steps={given.steps}",
        f"training.global_batch_size={given.ranks}",
        "training.per_device_train_batch_size=1",
        "deepspeed.preset=zero3",
        "checkpoint.resume=none",
        f"run.output_dir={folder / 'big-run'}",
        "run.logging_steps=1",
        "run.report_to=none",
        *given.overrides,
    ]


def memory(pid: int, kind: str) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        found = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += [*children, *(below for child in children for below in descendants(child))]
    return found


class Watch:
    """The peaks of a process and of all that it starts, from outside."""

    def __init__(self, pid: int) -> None:
        self.pid, self.together = pid, 0
        self.anonymous: dict[int, int] = {}
        self.all: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLED):
            now = {pid: memory(pid, "RssAnon") for pid in descendants(self.pid)}
            self.together = max(self.together, sum(now.values()))
            for pid, size in now.items():
                self.anonymous[pid] = max(size, self.anonymous.get(pid, 0))
                self.all[pid] = max(memory(pid, "VmHWM"), self.all.get(pid, 0))


def train(folder: Path, given: argparse.Namespace) -> int:
    write_records(folder / "big-train.jsonl")
    shutil.rmtree(folder / "big-run", ignore_errors=True)
    (folder / "big.yaml").write_text("{}\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={given.ranks}"]
    command = [*launcher, f"--master_port={free_port()}", "-m", "dist_subspace", "train", str(folder / "big.yaml")]
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.time()
    process = subprocess.Popen([*command, *configuration(folder, given)], env={**outside_ranks(), **own})
    watch = Watch(process.pid)
    status = process.wait()
    watch.stop()
    ranks = sorted(watch.anonymous, key=lambda pid: watch.anonymous[pid])[-given.ranks :]
    for number, pid in enumerate(sorted(ranks)):
        print(
            f"process {number}: peak {watch.anonymous[pid] / GIB:.2f} GiB anonymous, {watch.all[pid] / GIB:.2f} GiB with files"
        )
    print(f"all processes at once: {watch.together / GIB:.2f} GiB anonymous; {time.time() - began:.0f} s in all")
    for line in steps(folder / "big-run" / "metrics.jsonl"):
        print(line)
    return status


def steps(metrics: Path) -> list[str]:
    """What the run wrote of its steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [
        f"step {row['step']}: loss {row['loss']:.4f}, gradient {row.get('grad_norm', float('nan')):.4f}, "
        f"{row['elapsed_seconds']:.0f} s since the start of training"
        for row in rows
        if "loss" in row
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=("dense", "mixture"), default="dense")
    parser.add_argument("--parameters", type=float, help="about so many; 7e9 dense, 8e9 of a mixture if not given")
    parser.add_argument("--only-write", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("overrides", nargs="*", help="further keys of the configuration, key=value")
    given = parser.parse_args()
    folder = given.folder.absolute()
    os.nice(10)
    write(folder, given.shape, given.parameters or (8e9 if given.shape == "mixture" else 7e9))
    return 0 if given.only_write else train(folder, given)


if __name__ == "__main__":
    sys.exit(main())
