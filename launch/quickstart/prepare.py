"""What the quickstart trains on: FOLDER/model, FOLDER/train.jsonl and FOLDER/heldout.jsonl.

    python launch/quickstart/prepare.py FOLDER               a LLaMA pretrained here, on the standard library's docstrings
    python launch/quickstart/prepare.py FOLDER --data DIR    stories260K and openbookqa from a folder of real data

Nothing is done where FOLDER is there already.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from docstrings import docstrings, question, task_rows
from pretrain import VOCABULARY, pretrain, small_llama, train_tokenizer
from transformers import AutoTokenizer

HELDOUT = 120  # samples


def from_docstrings(folder: Path, steps: int, most_seconds: float) -> None:
    texts = docstrings()
    rows = task_rows(texts)
    heldout, train = rows[:HELDOUT], rows[HELDOUT:]
    # While it is pretrained the model sees no held-out docstring, and of no docstring the task's question.
    hidden = {row["prompt"] for row in heldout}
    kept = [f"# {each.module}\n{each.signature}\n{each.text}" for each in texts if question(each) not in hidden]
    print(
        f"{len(kept)} docstrings of the standard library to pretrain on, {len(train)} to fine-tune on, {HELDOUT} held out"
    )
    tokenizer = train_tokenizer(kept)
    random.Random(1).shuffle(kept)
    ids = tokenizer(kept)["input_ids"]
    tokens = torch.tensor([token for document in ids for token in [*document, tokenizer.eos_token_id]])
    model = small_llama(tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"pretraining a LLaMA of {size / 1e6:.1f} million parameters on {len(tokens) / 1e3:.0f} thousand tokens")
    loss = pretrain(model, tokens, steps, most_seconds)
    print(f"  pretrained: loss {loss:.2f} (chance: {math.log(VOCABULARY):.2f})")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "heldout.jsonl", heldout)


def from_data(folder: Path, data: Path) -> None:
    model = folder / "model"
    shutil.copytree(data / "models" / "stories260K" / "hf", model)
    # Its stories end with <s>; its </s> was never trained, and has the very same embedding as 250 unused byte tokens, so
    # that no adapter could learn to end an answer with it.
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"eos_token_id": tokenizer.bos_token_id}, indent=2))
    instruct = data / "instruct"
    write_lines(folder / "train.jsonl", json.loads((instruct / "openbookqa_train.json").read_text()))
    rows = json.loads((instruct / "openbookqa_test.json").read_text())
    write_lines(folder / "heldout.jsonl", random.Random(0).sample(rows, HELDOUT))
    print("stories260K (a pretrained LLaMA of 0.26 million parameters) and openbookqa")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def at_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """The folder appears whole or not at all, so that an interrupted run is not taken for a finished one."""
    growing = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    fill(growing)
    growing.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="a folder with models/stories260K/hf and instruct/")
    parser.add_argument("--steps", type=int, default=450, help="of the pretraining (a minute on two cores)")
    parser.add_argument("--most-seconds", type=float, default=140.0, help="on a slower machine it ends here")
    given = parser.parse_args()
    if given.folder.is_dir():
        print(f"{given.folder} is there already")
    elif given.data is not None:
        at_once(given.folder, lambda folder: from_data(folder, given.data))
    else:
        at_once(given.folder, lambda folder: from_docstrings(folder, given.steps, given.most_seconds))


if __name__ == "__main__":
    main()
