"""The command as a user starts it: figures of other people's programs, alike on any number of ranks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch.nn import functional

from dist_subspace.cli import main
from dist_subspace.evaluation.asked import Asked
from dist_subspace.evaluation.command import evaluate
from dist_subspace.interchange.card_signature import is_unedited
from tests.evaluation.runs import evaluated, refused, write_figures
from tests.faults.injection import SAID, Fault, install
from tests.faults.places import function
from tests.forked_ranks import report, run_ranks, side_by_side
from tests.tiny_run import make_model

EXACT = {"abs": 1e-9, "rel": 1e-9}


def losses_of_peft(home: Path, data: Path) -> tuple[float, int]:
    """Summed loss and number of targets, by transformers and PEFT, a record at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, home / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    loss, count = 0.0, 0
    for line in data.read_text().splitlines():
        record = json.loads(line)
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, record["output"])]
        target = [*ids[1], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids[0], *target]])).logits[0].double()
        of_targets = logits[len(ids[0]) - 1 : -1]
        loss += float(functional.cross_entropy(of_targets, torch.tensor(target), reduction="sum"))
        count += len(target)
    return loss, count


def test_the_loss_is_that_of_transformers_on_pefts_model(home: Path) -> None:
    found = evaluated(home / "run")
    loss, count = losses_of_peft(home, home / "eval.jsonl")
    measured = found["adapter"]["loss"]
    assert measured["value"] == pytest.approx(loss / count, rel=1e-5)
    assert found["adapter"]["perplexity"]["value"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    low, high = measured["interval"]
    assert low < measured["value"] < high
    assert found["about"]["samples"] == {"likelihood": 7}


def test_a_configuration_a_run_and_an_adapter_are_the_same_and_the_run_keeps_the_figures(home: Path) -> None:
    of_run = evaluated(home / "run", "--output", home / "figures.json")
    assert json.loads((home / "figures.json").read_text()) == of_run == evaluated(home / "config.yaml")
    of_adapter = evaluated(home / "run" / "adapter", "--data", home / "eval.jsonl")
    assert of_adapter == of_run
    assert json.loads((home / "run" / "evaluations" / "adapter-on-eval.json").read_text()) == of_run
    loss = of_run["adapter"]["loss"]["value"]
    card = ModelCard.load(home / "run" / "adapter" / "README.md")
    assert f"| loss | {loss:.4g} [" in card.text and is_unedited(str(card)), "a push takes them along"
    last = json.loads((home / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert of_run["adapter"]["loss"]["value"] == pytest.approx(last["eval_loss"], rel=1e-12)


def test_the_base_beside_the_adapter_is_the_base_alone(home: Path) -> None:
    both = evaluated(home / "run", "--compare-base")
    settings = ("model.storage=fp32", "data.format=alpaca", "training.per_device_train_batch_size=2")
    alone = evaluated("--base", home / "model", *settings, "--data", home / "eval.jsonl")
    assert both["base"] == alone["base"] and both["adapter"] == evaluated(home / "run")["adapter"]
    loss = both["adapter"]["loss"]["value"] - both["base"]["loss"]["value"]
    assert loss != 0 and both["difference"]["loss"]["value"] == pytest.approx(loss, **EXACT)


OF_RANKS = ("--compare-base", "--metrics", "loss,perplexity,exact_match,token_f1", "--max-new-tokens", "4")


@pytest.mark.parametrize(("ranks", "preset"), [(3, "zero3"), pytest.param(2, "zero0", marks=pytest.mark.slow)])
def test_ranks_have_the_same_figures_to_the_last_digit(home: Path, ranks: int, preset: str) -> None:
    """7 samples in micro-batches of 2, answers in batches of 8: ranks that are idle in a round, whole or split."""
    file, arguments = str(home / f"figures-{ranks}"), (str(home / "run"), *OF_RANKS)
    ended = run_ranks([(write_figures, file, *arguments, f"deepspeed.preset={preset}")] * ranks, home)
    assert [rank.status for rank in ended] == [0] * ranks, report(ended)
    first, *silent = (Path(f"{file}.{rank}").read_text() for rank in range(ranks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has
    assert json.loads(first) == evaluated(*arguments) and not any(silent)
    torch.set_num_threads(threads)
    assert json.loads(first)["about"]["samples"] == {"likelihood": 7, "answers": 7}


def test_the_table_says_what_was_measured_on_what(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(home / "run"), "--compare-base"]) == 0
    shown = capsys.readouterr().out
    assert "eval.jsonl: 7 samples" in shown and "(fp32)" in shown
    assert [line.split()[1] for line in shown.splitlines() if "│" in line] == ["loss", "perplexity"]


REFUSALS = [
    (["{home}/run", "--metrics", "bleu"], r"--metrics is 'bleu'; accepted: loss, perplexity, exact_match, token_f1"),
    (["{home}/run", "--metrics", "accuracy"], r"--metrics is 'accuracy'.*accepted: loss, perplexity"),
    (["{home}/run", "--metrics", "choice_accuracy"], "which needs --choice or --choices-field"),
    ([], "nothing to evaluate is named"),
    (["{home}/run", "--base", "{home}/model"], "both a target and --base"),
    (["{home}/model"], "holds no adapter"),
    (["{home}/config.yaml", "run.output_dir={home}/nothing"], "has no adapter yet"),
    (["{home}/run", "--data", "{home}/absent.jsonl"], "data.eval is .*absent.jsonl'; there is no such file"),
    (["{home}/run", "--data", "{home}/empty.jsonl"], "an empty file"),
    (["{home}/run", "data.eval=null"], "data.eval is null, and no --data is given"),
    (["{home}/run", "data.max_length=4096"], "data.max_length is 4096; accepted: at most 128"),
    (["{home}/run", "model.path={home}/other"], "is another model than the one"),
    (["--base", "{home}/model", "--data", "{home}/eval.jsonl"], "does not say how its samples are written"),
    (["{home}/other.yaml"], "is another model than the one"),
    (
        ["{home}/run", "model.dtype=float32"],
        "the override model.dtype changes nothing that is measured; accepted: data",
    ),
    (["{home}/run", "--limit", "0"], "--limit is 0"),
    (["{home}/run", "--answer-regex", "("], "no regular expression"),
    (["{home}/run", "--choice", "yes"], "once for each of two or more"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS, ids=[" ".join(row[0]) or "nothing" for row in REFUSALS])
def test_what_cannot_be_measured_is_refused_in_one_sentence(home: Path, arguments: list[str], sentence: str) -> None:
    (home / "empty.jsonl").touch()
    if not (home / "other").exists():
        make_model(home / "other", seed=1, layers=1)
        (home / "other.yaml").write_text((home / "config.yaml").read_text().replace("/model\n", "/other\n"))
    said = refused(*(argument.format(home=home) for argument in arguments))
    assert re.search(sentence, said), said


def broken_in_a_forward(*arguments: str) -> None:
    install(Fault(MLP, function("evaluation/scoring scores"), after=1))
    write_figures(*arguments)


MLP = "transformers.models.llama.modeling_llama:LlamaMLP.forward"


def test_ranks_end_alike_where_one_fails_or_all_are_refused(home: Path) -> None:
    """One sentence; the rank that waits in a collective leaves, too."""
    measured = (str(home / "lost"), str(home / "run"), "deepspeed.preset=zero3")
    calls: list[tuple[Any, ...]] = [(write_figures, *measured), (broken_in_a_forward, *measured)]
    unknown = (write_figures, str(home / "lost"), str(home / "run"), "--metrics", "bleu")
    failed, all_refused = side_by_side(lambda: run_ranks(calls, home), lambda: run_ranks([unknown] * 2, home))
    assert [rank.status for rank in failed] == [1, 1], report(failed)
    (sentence,) = (line for rank in failed for line in rank.errors)
    assert SAID in sentence and abs(failed[0].seconds - failed[1].seconds) < 10
    assert [rank.status for rank in all_refused] == [2, 2], report(all_refused)
    assert [len(rank.errors) for rank in all_refused] == [1, 0]


def test_the_exit_status_is_the_functions() -> None:
    assert evaluate(Asked()) == 2
