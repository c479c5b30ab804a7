"""Each kind of measurement against a program that we have not written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch.nn import functional

from dist_subspace.evaluation.measurements import BLOCK, blocks, prompt_and_answer
from tests.evaluation.runs import CLASSES, evaluated


def test_classes_are_those_of_peft_and_figures_those_of_scikit_learn(classified: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = evaluated(classified / "run", "--predictions", tmp_path / "results.jsonl", "--metrics", FIGURES)["adapter"]
    rows = [json.loads(line) for line in (classified / "eval.jsonl").read_text().splitlines()]
    base = AutoModelForSequenceClassification.from_pretrained(classified / "model", num_labels=3, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, classified / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(classified / "model")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    true, predicted = [CLASSES.index(row["label"]) for row in rows], logits.argmax(-1).tolist()
    assert found["loss"]["value"] == pytest.approx(
        float(functional.cross_entropy(logits, torch.tensor(true))), rel=1e-5
    )
    assert found["accuracy"]["value"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert found["f1"]["value"] == pytest.approx(sklearn.f1_score(true, predicted, average="macro", zero_division=0))
    assert found["matthews"]["value"] == pytest.approx(sklearn.matthews_corrcoef(true, predicted))
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["predicted_text"] for result in results] == [CLASSES[label] for label in predicted]


FIGURES = "loss,accuracy,f1,matthews"


def test_answers_are_those_of_transformers(home: Path, tmp_path: Path) -> None:
    """Greedy, after the training's own prompt; the expression finds the digit in both texts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    regex, file = r"(\d)", tmp_path / "results.jsonl"
    found = evaluated(home / "run", "--answer-regex", regex, "--predictions", file, "--max-new-tokens", 6)["adapter"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32), home / "run" / "adapter"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    results = [json.loads(line) for line in file.read_text().splitlines()]
    results = [result for result in results if result["kind"] == "answers"]
    right = []
    for record, result in zip(map(json.loads, (home / "eval.jsonl").read_text().splitlines()), results, strict=True):
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        made = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        assert (result["text"], result["wanted"]) == (text, record["output"].split()[-1])
        digits = [character for character in text if character.isdigit()]
        assert result["answer"] == (digits[-1] if digits else None)
        right.append(result["answer"] == result["wanted"])
    assert found["exact_match"]["value"] == pytest.approx(sum(right) / len(right))


def test_a_choice_is_as_likely_as_transformers_says(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts, file = ["yes, it is", "no"], tmp_path / "questions.jsonl"
    rows = [{"instruction": f"is {n} even?", "output": texts[n % 2]} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [option for text in texts for option in ("--choice", text)]
    settings = ("model.storage=fp32", "data.format=alpaca", "--data", file, "--predictions", tmp_path / "results.jsonl")
    found = evaluated(
        "--base", home / "model", *settings, *options, "--metrics", "choice_accuracy,choice_accuracy_norm"
    )
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    expected = []
    for row in rows:
        prompt = tokenizer(f"### Instruction:\n{row['instruction']}\n\n### Response:\n").input_ids
        of_row = []
        for text in texts:
            target = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *target]])).logits[0].double().log_softmax(-1)
            of_row.append(float(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(target)[:, None]).sum()))
        expected.append(of_row)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["right"] for result in results] == [n % 2 for n in range(5)]
    assert [result["log_likelihoods"] for result in results] == [pytest.approx(of_row, rel=1e-5) for of_row in expected]
    likeliest, by_length = (np.argmax(np.array(expected) / size, axis=1) for size in (1, [len(text) for text in texts]))
    right = np.arange(5) % 2
    assert found["base"]["choice_accuracy"]["value"] == pytest.approx((likeliest == right).mean())
    assert found["base"]["choice_accuracy_norm"]["value"] == pytest.approx((by_length == right).mean())


def test_a_sample_is_parted_before_its_last_answer() -> None:
    ids, trained = np.arange(9), np.array([0, 0, 1, 1, 0, 0, 1, 1, 0], bool)
    prompt, answer = prompt_and_answer(ids, trained)
    assert (prompt.tolist(), answer.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])


def test_blocks_depend_on_the_samples_alone() -> None:
    count = 2 * BLOCK + 3
    assert [len(block) for block in blocks(count)] == [BLOCK, BLOCK, 3]
    assert blocks(count, first=BLOCK) == blocks(count)[1:] and blocks(0) == []
