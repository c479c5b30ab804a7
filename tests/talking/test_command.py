"""`dist-subspace generate`: a run is trained, asked, and answers as its merged model does in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import dist_subspace as dsub
from dist_subspace.cli import main
from tests.forked import run_lines
from tests.tiny_run import make_model, make_records
from tests.whole_runs import configuration

PROMPT = "### Instruction:\nsay 3\n\n### Response:\n"


def test_a_trained_run_answers_as_its_merged_model_does_in_transformers(tmp_path: Path) -> None:
    """All in one process, as in a notebook: trained, gone on with, refused, asked, talked to, merged."""
    make_model(tmp_path / "model", layers=1)
    make_records(tmp_path / "train.jsonl", 20)
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(configuration(tmp_path, run, learning_rate=0.1)))
    (tmp_path / "typed").write_text("say 3\n/base\n")
    asked = f"['generate', {str(run)!r}, '--max-new-tokens', '12', '--temperature', '0'"
    ended = run_lines(
        "import sys\nimport dist_subspace as dsub\nfrom dist_subspace.cli import main\n"
        f"first = dsub.train({str(config)!r}, ['training.max_steps=3'])\nassert dsub.train({str(config)!r}) == first\n"
        f"try:\n    dsub.train({str(config)!r}, ['subspace.rank=9'])\n"
        "except dsub.errors.UsageError as error:\n    print('REFUSED', error)\nprint('PROMPT', flush=True)\n"
        f"statuses = [main({asked}, '--prompt', 'say 3', '--compare-base'])]\nprint('CHAT', flush=True)\n"
        f"sys.stdin = open({str(tmp_path / 'typed')!r})\n"
        f"statuses += [main({asked}, '--chat'])]\nprint('END', flush=True)\n"
        f"statuses += [main(['merge', {str(run)!r}, {str(tmp_path / 'merged')!r}, '--dtype', 'float32'])]\n"
        "print('STATUSES', statuses)"
    )
    assert "STATUSES [0, 0, 0]" in ended.stdout, ended
    assert "finished after step 6" in ended.stdout and "was made with another method" in ended.stdout, ended
    texts = []
    for folder in (tmp_path / "model", tmp_path / "merged"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
        made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        texts.append(text.replace("\r\n", "\n").replace("\r", "\n"))  # as a file of text is read
    base, trained = texts
    assert base != trained
    answered = ended.stdout.partition("PROMPT\n")[2].partition("CHAT\n")
    assert answered[0] == f"{base}\n{trained}\n" and answered[2].startswith(f"{trained}\n{base}\nEND")
    assert "earlier turns" in ended.stderr and "(--preset none)" in ended.stderr
    own = json.loads((run / "adapter" / "dist_subspace.json").read_text())
    assert own["prompts"] == {"format": "alpaca"}, "an adapter that leaves its run says how it is asked"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "error: no prompt is given; accepted: one of --prompt, --chat, --input"),
        (["none", "--prompt", "x"], "error: PATH is 'none', which is no folder"),
    ],
)
def test_what_is_refused_is_one_sentence_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("starting:")]
    assert len(lines) == 1 and lines[0].startswith(said)


def test_an_adapter_that_classifies_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", layers=1)
    model = dsub.load_frozen(tmp_path / "model", storage="fp32", task="classification", num_labels=3, pad_token_id=1)
    dsub.attach(model, dsub.SubspaceConfig(rank=2, modules_to_save=["score"]))
    folder = dsub.save_adapter(model, tmp_path / "adapter")
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "x"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "is of model.task 'classification', which writes no text" in said[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x"], "does not say how its prompts are written; accepted: a run, or a format"),
        (["--prompt", "x", "--format", "alpacca"], "data.format is 'alpacca'"),
        (["--prompt", "x", "--format", "chat", "--set", "temprature=1"], "(did you mean 'temperature'?)"),
        (["--prompt", "x", "--format", "chat", "--tools", "none.json"], "--tools is 'none.json', which cannot be read"),
        (["--prompt", "x", "--format", "chat", "--generation-config", "none"], "generation_config is 'none'"),
        (["--input", "none.jsonl", "--output", "out.jsonl", "--format", "chat"], "--input is 'none.jsonl'"),
        (["--input", "README.md", "--output", "x/y", "--format", "chat"], "--input is 'README.md', of an unknown kind"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_looked_for(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's base is gone."""
    make_model(tmp_path / "model", layers=1)
    model = dsub.attach(dsub.load_frozen(tmp_path / "model", storage="fp32"), dsub.SubspaceConfig(rank=2))
    folder = dsub.save_adapter(model, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "model")
    capsys.readouterr()
    assert main(["generate", str(folder), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0], errors
