"""Conversations tokenised a second: `python -m tests.benchmarks.tokenising [--base FOLDER] [--conversations N]`.

Eight messages each, a template like Qwen3's, a byte-level tokenizer. `--base` is a checkout of an older tree, measured in the
same minute by the same file. Prints conversations a second and the ratio, of elapsed time and of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
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


def _measured_in(tree: Path, file: Path, folder: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(tree), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__)), "--one", str(file), "--cache", str(folder)]
    found = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout.decode().strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--base-conversations", type=int, default=500)
    parser.add_argument("--words", type=int, default=60, help="words of a message")
    parser.add_argument("--one", type=Path)
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one, given.cache)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = [("this tree", ROOT, given.conversations)] + (
            [("base", given.base, given.base_conversations)] if given.base else []
        )
        speeds = []
        for label, tree, count in trees:
            file = folder / f"{label}.jsonl"
            write_talks(file, count, given.words)
            found = _measured_in(tree, file, folder / label)
            speeds.append((count / found["seconds"], count / found["processor"]))
            print(
                f"{label}: {count:,} conversations, {speeds[-1][0]:,.0f} a second, {speeds[-1][1]:,.0f} a processor second"
            )
        if len(speeds) == 2:
            print(
                f"ratio: {speeds[0][0] / speeds[1][0]:.1f} in elapsed time, {speeds[0][1] / speeds[1][1]:.1f} in processor time"
            )


if __name__ == "__main__":
    main()
