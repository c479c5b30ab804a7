"""Micro-batches of preferences: TRL's layout, the counts, and whose answer stands behind whose prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace.training.data import Batches, BatchSettings, TokenTable, eval_batches
from dist_subspace.training.data.preference_batch import chosen_tokens, split_single
from tests.training.data.tokens_for_tests import prepared

pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
PAD = 2


def table(folder: Path, form: str, count: int = 6) -> TokenTable:
    def record(n: int) -> dict[str, Any]:
        answers = {"chosen": "y" * (n + 1), "rejected": "no"} if form == "preference" else {"completion": "a" * (n + 1)}
        return {"prompt": "abc"[: 1 + n % 3], "label": n % 2 == 0} | answers

    (folder / "records.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(count)))
    return prepared(folder, train=str(folder / "records.jsonl"), format=form, max_length=20).train


def batches(rows: TokenTable, objective: str, micro: int, rank: int = 0, size: int = 1, length: int = 20) -> Batches:
    settings = BatchSettings(6, micro, seed=0, packing=False, max_length=length, objective=objective)
    return Batches(rows, settings, PAD, rank, size)


def test_chosen_rows_come_before_the_rejected_and_only_answers_are_predicted(tmp_path: Path) -> None:
    rows = table(tmp_path, "preference")
    batch = batches(rows, "dpo", 3).batch(0)
    assert (batch.terms, batch.samples) == (6, 6) and len(batch.rounds) == 2
    for micro in batch.rounds:
        assert micro is not None and micro.preferences is not None and micro.terms == micro.samples == 3
        ids, labels, mask = micro.inputs["input_ids"], micro.labels, micro.inputs["attention_mask"]
        assert ids.shape == (6, ids.shape[1]) and torch.equal(labels[labels >= 0], ids[labels >= 0])
        assert torch.equal(labels >= 0, micro.preferences.completions.bool())
        assert micro.targets == int((labels >= 0).sum()) and micro.tokens == int(mask.sum())
        lengths = mask.sum(1)
        assert all(micro.inputs["position_ids"][row, :n].tolist() == list(range(n)) for row, n in enumerate(lengths))
    assert batch.tokens == sum(micro.tokens for micro in batch.rounds if micro is not None)


def test_orpo_predicts_the_chosen_texts_with_their_prompts_and_counts_them(tmp_path: Path) -> None:
    rows = table(tmp_path, "preference")
    batch = batches(rows, "orpo", 6).batch(0)
    (micro,) = batch.rounds
    assert micro is not None and micro.preferences is not None
    chosen = micro.inputs["attention_mask"][:6, 1:].sum()
    assert int((micro.labels[:6] >= 0).sum()) == chosen == micro.preferences.chosen_tokens == batch.chosen_tokens
    assert chosen_tokens(rows, range(6)) == chosen
    assert torch.equal(micro.labels[6:] >= 0, micro.preferences.completions[6:].bool())


def others(batch_rounds: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each row in which the two are not of one record."""
    found = []
    for micro in batch_rounds:
        other = micro.preferences.mismatched
        for ids, mask, answers in zip(
            other.inputs["input_ids"], other.inputs["attention_mask"], other.preferences.completions, strict=True
        ):
            found.append((ids[(mask > 0) & (answers == 0)].tolist(), ids[answers > 0].tolist()))
    return found


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_every_answer_stands_once_behind_the_prompt_of_the_next_sample(micro: int, tmp_path: Path) -> None:
    """In the whole global batch, however it is divided among micro-batches and ranks."""
    rows = table(tmp_path, "unpaired-preference")
    made = batches(rows, "kto", micro)
    order = made.first_samples(6)
    expected = [(split_single(rows, i)[0], split_single(rows, order[n - 1])[1]) for n, i in enumerate(order)]
    assert others(made.batch(0).rounds) == expected
    ranks = [batches(rows, "kto", micro, rank, 2).batch(0).rounds for rank in (0, 1)]
    dealt = [each for pair in zip(*ranks, strict=True) for each in pair if each is not None]
    assert others(dealt) == expected
    held = list(eval_batches(rows, rank=0, world_size=1, micro_batch_size=micro, pad_id=PAD, objective="kto"))
    assert sorted(answer for _, answer in others(held)) == sorted(answer for _, answer in expected)


def test_an_answer_behind_a_longer_prompt_stays_within_the_longest_row(tmp_path: Path) -> None:
    rows = table(tmp_path, "unpaired-preference")
    (micro,) = batches(rows, "kto", 6, length=8).batch(0).rounds
    assert micro is not None and micro.preferences is not None and micro.preferences.mismatched is not None
    assert micro.preferences.mismatched.inputs["input_ids"].shape[1] == 8
    assert micro.preferences.desirable is not None and micro.preferences.desirable.sum() == 3
