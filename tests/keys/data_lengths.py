"""The keys of `data` that say how long a row may be, and what stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, FalconForCausalLM

from dist_subspace.run_folder.status import EXIT_USAGE
from tests.keys.begun import Row, begin
from tests.keys.bench import UNSET, Bench
from tests.keys.data_reference import IGNORED, all_trained, answered, assert_same, conversed, tokenizer_of, usual
from tests.keys.reference import padded
from tests.tiny_models import tiny_config
from tests.tiny_run import make_tokenizer


def max_length(bench: Bench) -> None:
    """A prompt loses its left part behind the mark, an answer nothing; a text is cut into pieces of that length."""
    tokenizer, limit = tokenizer_of(bench), 24
    records = [{"prompt": "0123456789" * n, "completion": "abcdefgh"[: 9 - n]} for n in range(1, 5)]
    records.append({"prompt": "p", "completion": "too long " * 4})
    expected = []
    for record in records[:-1]:
        ids, labels = answered(tokenizer, record["prompt"], record["completion"])
        over = max(0, len(ids) - limit)
        expected.append((ids[:1] + ids[1 + over :], labels[:1] + labels[1 + over :]))
    begun = begin(bench, usual(bench, records, "completion", data__max_length=limit))
    assert_same(begun.rows, expected, "completion")
    assert begun.plan.data.left_out == 1, "what is left out is counted"
    ids, _ = all_trained(tokenizer, "x" * 40 + "y" * 20)
    pieces = [ids[start : start + limit] for start in range(0, len(ids), limit)]
    found = begin(bench, usual(bench, [{"text": "x" * 40 + "y" * 20}], "text", data__max_length=limit)).rows
    assert_same(found, [(piece, [IGNORED, *piece[1:]]) for piece in pieces], "text")


def packing(bench: Bench) -> None:
    """Rows are shared, positions begin anew, nothing is predicted across a border: the run has the loss of the samples alone."""
    changes = {"data.packing": True, "training.max_steps": 1, "training.global_batch_size": None}
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    texts = [json.loads(line)["text"] for line in Path(bench.data).read_text().splitlines()]
    expected = [all_trained(tokenizer, text) for text in texts]
    begun = begin(bench, changes)
    rows = [row for row in begun.rows if any(label != IGNORED for label in row[1])]
    assert_same(rows, expected, "packed")
    assert len(begun.micro_batches) < len(expected) / 2, "rows are not shared"
    for micro in begun.micro_batches:
        assert micro.inputs["input_ids"].shape == (1, 64) and "attention_mask" not in micro.inputs
    _assert_no_mask(begun.model, begun.micro_batches[0].inputs)
    outcome = bench.run(changes)
    assert len(outcome.trained_on) == len(begun.micro_batches)
    with torch.no_grad():
        alone = bench.peft_model().eval()(**padded([ids for ids, _ in expected])).loss
    assert outcome.steps[0]["loss"] == pytest.approx(float(alone), rel=2e-5)
    mixing = {"model.path": _falcon(bench), "subspace.init_from": UNSET, "subspace.rank": 2}
    refused = bench.run(changes | mixing, expect=EXIT_USAGE)
    assert "data.packing is true, but FalconForCausalLM does not keep packed samples apart" in refused.message
    apart = begin(bench, {"data.packing": False})
    assert len(apart.micro_batches) == len(expected) and "attention_mask" in apart.micro_batches[0].inputs


def _assert_no_mask(model: Any, inputs: dict[str, Any]) -> None:
    """Of tokens x tokens, which transformers would make."""
    masks: list[Any] = []
    layer = model.model.layers[0].self_attn
    hook = layer.register_forward_pre_hook(lambda _, args, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    hook.remove()
    assert masks == [None], "packed rows run with a mask of tokens x tokens"


def _falcon(bench: Bench) -> str:
    """A model whose attention knows no borders of samples."""
    folder, tokenizer = bench.folder / "falcon", make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    FalconForCausalLM(tiny_config("FalconConfig", **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def truncation(bench: Bench) -> None:
    """`turns` drops whole oldest turns and keeps the system turn; `tokens` cuts from the left, behind the mark."""
    tokenizer, limit = tokenizer_of(bench), 64
    system = [{"role": "system", "content": "be kind"}]
    turns: list[dict[str, Any]] = []
    for n in range(6):
        turns += [
            {"role": "user", "content": f"{n} is?"},
            {"role": "assistant", "content": f"{n} was.", "train": n == 5},
        ]
    given = usual(bench, [{"messages": [*system, *turns]}], "chat", data__max_length=limit)
    plain = [{key: value for key, value in message.items() if key != "train"} for message in turns]
    kept = [_last_trained(conversed(tokenizer, [*system, *plain[n:]])) for n in range(0, len(plain), 2)]
    fitting = next(row for row in kept if len(row[0]) <= limit)
    assert fitting not in (kept[0], kept[-1])
    assert_same(begin(bench, given).rows, [fitting], "turns")
    (ids, labels), over = kept[0], len(kept[0][0]) - limit
    cut = (ids[:1] + ids[1 + over :], labels[:1] + labels[1 + over :])
    assert_same(begin(bench, given | {"data.truncation": "tokens"}).rows, [cut], "tokens")


def _last_trained(row: Row) -> Row:
    """The row with its last answer as the only one that is trained."""
    ids, labels = row
    start = max(n for n in range(1, len(labels)) if labels[n] != IGNORED and labels[n - 1] == IGNORED)
    return ids, [IGNORED] * start + labels[start:]
