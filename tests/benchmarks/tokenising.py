"""Conversations tokenised a second: `python -m tests.benchmarks.tokenising [--base FOLDER] [--words 8 30 60 250]`.

Eight messages each, a template like Qwen3's, a byte-level tokenizer. `--base` is a checkout of an older tree, measured in turns
with this one by the same file. This tree is measured on one core, and on all that there are with its workers. Prints
conversations a second of elapsed time and of processor time (workers and their start included), and both as multiples of
the base's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORDS = 4000  # different words of the messages


def make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(vocabulary())], trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (ROOT / "tests/training/data/templates/qwen3.jinja").read_text("utf-8")
    return tokenizer


def vocabulary() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(WORDS)]


def write_talks(file: Path, count: int, words: int) -> None:
    draw, known = random.Random(1), vocabulary()
    with file.open("w") as lines:
        for _ in range(count):
            turns = [" ".join(draw.choices(known, k=draw.randint(words // 2, words * 3 // 2))) for _ in range(8)]
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
            lines.write(json.dumps({"messages": messages}) + "\n")


def measured(file: Path, cache: Path) -> dict[str, float]:
    """Seconds and processor seconds of this tree for the file, workers included."""
    from dist_subspace.training.data import DataSettings, prepare

    tokenizer = make_tokenizer()
    start, used = time.monotonic(), _processor()
    data = prepare(
        DataSettings(train=str(file), format="chat", max_length=4096), tokenizer, cache, 0, False, "causal-lm"
    )
    return {"seconds": time.monotonic() - start, "processor": _processor() - used, "samples": len(data.train)}


def _processor() -> float:
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def _measured_in(tree: Path, file: Path, folder: Path, cores: int) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(tree), "TOKENIZERS_PARALLELISM": "false"}
    # -P: a file of this folder has the name of one of Python's own modules
    command = [
        sys.executable,
        "-P",
        str(Path(__file__)),
        "--one",
        str(file),
        "--cache",
        str(folder),
        "--cores",
        str(cores),
    ]
    found = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout.decode().strip().splitlines()[-1])


def compared(words: int, count: int, base: Path | None, repeats: int) -> None:
    """Print the medians for messages of so many words."""
    cores = len(os.sched_getaffinity(0))
    runs = [("base", base, max(100, count // 40), 1)] if base else []
    runs += [("one core", ROOT, count, 1), (f"{cores} cores", ROOT, count, cores)]
    speeds: dict[str, list[tuple[float, float]]] = {label: [] for label, *_ in runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, _, number, _ in runs:
            write_talks(folder / f"{label}.jsonl", number, words)
        for repeat in range(repeats):
            for label, tree, number, used in runs:
                assert tree is not None
                found = _measured_in(tree, folder / f"{label}.jsonl", folder / f"{label} {repeat}", used)
                speeds[label].append((number / found["seconds"], number / found["processor"]))
    medians = {label: tuple(map(statistics.median, zip(*found))) for label, found in speeds.items()}
    for label, _, number, _ in runs:
        elapsed, processor = medians[label]
        line = f"{words} words, {label}: {number:,} conversations, {elapsed:,.0f} a second, {processor:,.0f} a processor second"
        if base and label != "base":
            line += f"; {elapsed / medians['base'][0]:.1f} and {processor / medians['base'][1]:.1f} times the base's"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--total", type=int, default=8_000_000, help="words of all conversations, at most")
    parser.add_argument("--words", type=int, nargs="+", default=[8, 30, 60, 250], help="words of a message")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--cores", type=int)
    given = parser.parse_args()
    if given.one:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        print(json.dumps(measured(given.one, given.cache)))
        return
    for words in given.words:
        compared(words, min(20_000, given.total // (8 * words)), given.base, given.repeats)


if __name__ == "__main__":
    main()
