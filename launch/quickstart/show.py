"""What the fine-tuning changed, on samples that it has not seen: answers and loss before and after.

python launch/quickstart/show.py MODEL ADAPTER HELDOUT
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.utils import logging

import dist_subspace as dsub

BATCH = 20  # samples at once
SHOWN = 4  # samples shown in words
Rows = list[dict[str, str]]


@dataclass
class Verdict:
    """The mean loss over the right answers' tokens (nats), and the greedy answers, of one model."""

    loss: float
    answers: list[str]

    def right(self, rows: Rows) -> float:
        return sum(answer == row["completion"].strip() for answer, row in zip(self.answers, rows)) / len(rows)

    def well_formed(self, rows: Rows) -> float:
        """The share of answers that are one of the possible answers, letter for letter."""
        possible = {row["completion"].strip() for row in rows}
        return sum(answer in possible for answer in self.answers) / len(rows)


def as_pair(row: dict[str, str]) -> dict[str, str]:
    """A record as prompt and completion; Alpaca's as it was trained."""
    if "instruction" not in row:
        return row
    given = f"\n\n### Input:\n{row['input']}" if row.get("input", "").strip() else ""
    prompt = f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


@torch.no_grad()
def examine(model: Any, tokenizer: Any, rows: Rows) -> Verdict:
    """The model as it is now, on all rows."""
    model.eval()
    total, count = 0.0, 0
    answers: list[str] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        loss, tokens, longest = answer_loss(model, tokenizer, batch)
        total, count = total + loss, count + tokens
        answers += greedy_answers(model, tokenizer, batch, longest + 4)
    return Verdict(total / count, answers)


def answer_loss(model: Any, tokenizer: Any, batch: Rows) -> tuple[float, int, int]:
    """Summed loss of the right answers, their tokens, and the tokens of the longest of them."""
    wholes = [tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in batch]
    borders = [len(tokenizer(row["prompt"])["input_ids"]) for row in batch]
    width = max(map(len, wholes))
    ids = torch.tensor([whole + [0] * (width - len(whole)) for whole in wholes], device=model.device)
    real = torch.tensor([[1] * len(whole) + [0] * (width - len(whole)) for whole in wholes], device=model.device)
    targets = torch.full_like(ids, -100)
    for row, (whole, border) in enumerate(zip(wholes, borders)):
        targets[row, border : len(whole)] = ids[row, border : len(whole)]
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    sizes = [len(whole) - border for whole, border in zip(wholes, borders)]
    return loss.item(), sum(sizes), max(sizes)


def greedy_answers(model: Any, tokenizer: Any, batch: Rows, new_tokens: int) -> list[str]:
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in batch]
    width = max(map(len, prompts))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    found = model.generate(
        ids, attention_mask=real, max_new_tokens=new_tokens, do_sample=False, pad_token_id=end, eos_token_id=end
    )
    return [text.strip() for text in tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)]


def short(text: str, width: int) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= width else line[: width - 1] + "…"


def tell(rows: Rows, before: Verdict, after: Verdict) -> None:
    print(f"\nHeld-out samples, never trained on ({len(rows)} in all; the first {SHOWN}):")
    for row, old, new in list(zip(rows, before.answers, after.answers))[:SHOWN]:
        print(f"\n  prompt   {short(row['prompt'], 200)}")
        print(f"  expected {short(row['completion'], 90)}\n  before   {short(old, 90)}\n  after    {short(new, 90)}")
    commonest = Counter(row["completion"] for row in rows).most_common(1)[0][1] / len(rows)
    print(f"\n{'on all of them':34}{'before':>9}{'after':>9}")
    print(f"{'loss of the right answer':34}{before.loss:9.3f}{after.loss:9.3f}")
    print(f"{'answers of a possible form':34}{before.well_formed(rows):9.0%}{after.well_formed(rows):9.0%}")
    print(f"{'right answers':34}{before.right(rows):9.0%}{after.right(rows):9.0%}", end="")
    print(f"   (the commonest answer each time: {commonest:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--remark", help="a line for the end")
    given = parser.parse_args()
    logging.set_verbosity_error()
    rows = [as_pair(json.loads(line)) for line in given.heldout.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(given.adapter)
    model = dsub.load_frozen(given.model, storage=given.storage, double_quant=True)
    before = examine(model, tokenizer, rows)
    after = examine(dsub.load_adapter(model, given.adapter), tokenizer, rows)
    tell(rows, before, after)
    if given.remark:
        print(given.remark)
    if after.loss >= before.loss:
        raise SystemExit("the held-out loss did not fall: the fine-tuning taught nothing")


if __name__ == "__main__":
    main()
