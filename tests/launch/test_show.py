"""What the quickstart shows after a run is true: losses and answers are those of the plain model, one sample at a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_subspace as dsub
from tests.interchange.trained import trained
from tests.ranks import ROOT
from tests.tiny_run import make_model

ROWS = [
    {"prompt": "say one", "completion": " 1"},
    {"prompt": "say something longer than that", "completion": " long, and longer"},
    {"prompt": "say", "completion": " 22 22"},
]


def script(name: str) -> Any:
    """A script of launch/quickstart, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", ROOT / "launch" / "quickstart" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of it with its tokenizer."""
    root = tmp_path_factory.mktemp("show")
    make_model(root / "model", layers=1)
    dsub.save_adapter(trained(dsub.load_frozen(root / "model", storage="fp32")), root / "adapter")
    (root / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def alone(model: Any, tokenizer: Any) -> tuple[float, list[str]]:
    """By transformers' own loss and its greedy search, without padding."""
    total, count, answers = 0.0, 0, []
    longest = max(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in ROWS)
    for row in ROWS:
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answer = torch.tensor([[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
        labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
        with torch.no_grad():
            loss = model(input_ids=torch.cat([prompt, answer], dim=1), labels=labels).loss
            found = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=longest + 4,
                do_sample=False,
                pad_token_id=1,
            )
        total, count = total + float(loss) * answer.numel(), count + answer.numel()
        answers.append(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return total / count, answers


def test_losses_and_answers_of_a_batch_are_those_of_its_samples(folder: Path) -> None:
    show: ModuleType = script("show")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    loss, answers = alone(model, tokenizer)
    for size in (20, 2):
        show.BATCH = size
        verdict = show.examine(model.train(), tokenizer, ROWS)
        assert verdict.loss == pytest.approx(loss, rel=1e-5)
        assert verdict.answers[:size] == answers[:size] and len(set(answers)) > 1
    verdict = show.Verdict(1.0, [" 1".strip(), "22 22", "something else"])
    assert (verdict.right(ROWS), verdict.well_formed(ROWS)) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("better", [True, False])
def test_before_is_the_base_and_after_the_adapter_and_a_loss_that_did_not_fall_is_a_failure(
    better: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show: ModuleType = script("show")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    before, _ = alone(base, tokenizer)
    adapter = folder / f"better-{better}"
    model = dsub.load_frozen(folder / "model", storage="fp32")
    dsub.attach(model, dsub.SubspaceConfig(rank=4))
    optimizer = torch.optim.Adam(dsub.trainable_parameters(model), lr=0.01, maximize=not better)
    ids = tokenizer(ROWS[1]["prompt"] + ROWS[1]["completion"], return_tensors="pt")["input_ids"]
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after, _ = alone(model.eval(), tokenizer)
    assert (after < before - 0.01) == better
    dsub.save_adapter(model, adapter)
    monkeypatch.setattr(
        sys, "argv", ["show.py", *map(str, (folder / "model", adapter, folder / "heldout.jsonl")), "--storage", "fp32"]
    )
    if better:
        show.main()
    else:
        with pytest.raises(SystemExit, match="the held-out loss did not fall"):
            show.main()
    assert f"{before:9.3f}{after:9.3f}\n" in capsys.readouterr().out


def test_a_task_of_docstrings_has_the_commonest_public_modules_and_no_more_of_one_than_of_another() -> None:
    docstrings = script("docstrings")
    counts = {f"m{n}": 150 + n for n in range(14)} | {"_private": 500}
    texts = [docstrings.Docstring(m, "def f()", f"{m}, text {n}") for m, count in counts.items() for n in range(count)]
    rows = docstrings.task_rows(texts)
    found = {row["completion"] for row in rows}
    assert found == {f" m{n}" for n in range(2, 14)}
    assert all(sum(row["completion"] == each for row in rows) == 140 for each in found)
    assert all(f"\n{row['completion'].strip()}, text " in row["prompt"] for row in rows)
    assert rows[0]["completion"] != rows[1]["completion"] or rows[1]["completion"] != rows[2]["completion"]
