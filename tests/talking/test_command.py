"""`dist-subspace generate`: a run is trained, asked, and answers as its merged model does in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from dist_subspace.cli import main
from tests.forked import run_lines
from tests.tiny_run import make_model, make_records
from tests.whole_runs import configuration

PROMPT = "### Instruction:\nsay 3\n\n### Response:\n"


def test_a_trained_run_answers_as_its_merged_model_does_in_transformers(tmp_path: Path) -> None:
    make_model(tmp_path / "model", layers=1)
    make_records(tmp_path / "train.jsonl", 20)
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(configuration(tmp_path, run, learning_rate=0.1)))
    (tmp_path / "typed").write_text("say 3\n/base\n")
    asked = f"['generate', {str(run)!r}, '--max-new-tokens', '12', '--temperature', '0'"
    ended = run_lines(
        "import sys\nfrom dist_subspace.cli import main\n"
        f"statuses = [main(['train', {str(config)!r}])]\nprint('PROMPT', flush=True)\n"
        f"statuses += [main({asked}, '--prompt', 'say 3', '--compare-base'])]\nprint('CHAT', flush=True)\n"
        f"sys.stdin = open({str(tmp_path / 'typed')!r})\n"
        f"statuses += [main({asked}, '--chat'])]\nprint('END', flush=True)\n"
        f"statuses += [main(['merge', {str(run)!r}, {str(tmp_path / 'merged')!r}, '--dtype', 'float32'])]\n"
        "print('STATUSES', statuses)"
    )
    assert "STATUSES [0, 0, 0, 0]" in ended.stdout, ended
    texts = []
    for folder in (tmp_path / "model", tmp_path / "merged"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([[0, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
        made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(made, skip_special_tokens=True))
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
