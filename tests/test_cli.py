"""Every option of the command line does what its help says, and the exit status says how it ended."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.launchers import is_first
from dist_subspace.run_folder.status import read_status
from tests.forked import run_lines
from tests.interchange.trained import frozen, saved_base, trained
from tests.tiny_models import logits, tiny_model, vision_model
from tests.tiny_run import make_model, make_records

VISION = "Qwen3_5ForConditionalGeneration"


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def reloaded(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", layers=1)
    make_records(tmp_path / "train.jsonl", 12)
    values = {
        "model": {"path": str(tmp_path / "model"), "storage": "fp32"},
        "subspace": {"method": "lora", "rank": 2},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32, "packing": False},
        "training": {"max_steps": 4, "global_batch_size": 2, "per_device_train_batch_size": 2},
        "checkpoint": {"save_steps": 1},
        "run": {"output_dir": str(tmp_path / "run"), "report_to": "none"},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_train_takes_changes_and_leaves_with_the_runs_status_and_the_final_adapter_is_what_a_run_is(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"
    ended = run_lines(
        "from dist_subspace.cli import main\n"
        f"refused = main(['train', {str(config)!r}, 'subspace.rank=99'])\n"
        f"print('STATUS', refused, main(['train', {str(config)!r}, 'training.max_steps=2', 'subspace.rank=3']))"
    )
    assert "STATUS 2 0" in ended.stdout, ended
    status = read_status(run)
    assert status is not None and (status["state"], status["step"]) == ("finished", 2)
    out = config.parent / "merged"
    (run / "adapter").rename(run / "final")
    capsys.readouterr()
    assert main(["inspect", str(run), "--json"]) == 0, "no adapter yet: the newest checkpoint"
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(run / "checkpoint-2") and told["rank"] == 3
    (run / "final").rename(run / "adapter")
    assert main(["merge", str(run), str(out), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["inspect", str(run)]) == 0
    assert f"adapter        {run / 'adapter'}" in capsys.readouterr().out


def test_merge_holds_the_base_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on NF4 and merged into full weights: PEFT's own merge of the same update."""
    base = saved_base(tmp_path / "base")
    folder = dsub.save_adapter(trained(frozen(base, storage="nf4")), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        tiny_model(), dsub.export_peft(folder, tmp_path / "peft", report=None).folder
    )
    theirs = theirs.merge_and_unload().eval()
    wanted = logits(theirs)
    assert main(["merge", str(folder), str(tmp_path / "full"), "--storage", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_drift"] is None, "no layer is quantised"
    assert near(logits(reloaded(tmp_path / "full")), wanted)
    assert main(["merge", str(folder), str(tmp_path / "held"), "--dtype", "float32"]) == 0
    assert not near(logits(reloaded(tmp_path / "held")), wanted)
    assert main(["merge", str(folder), str(tmp_path / "onto"), "--base", "original", "--dtype", "float32"]) == 0
    assert near(logits(reloaded(tmp_path / "onto")), wanted)
    rounded = ["--storage", "bf16", "--dtype", "float32"]
    assert main(["merge", str(folder), str(tmp_path / "rounded"), *rounded]) == 0
    assert main(["merge", str(folder), str(tmp_path / "read-again"), *rounded, "--base", "original"]) == 0
    merged = theirs.model.layers[1].mlp.up_proj.weight.detach()
    for name, alike in (("rounded", False), ("read-again", True)):
        assert near(reloaded(tmp_path / name).model.layers[1].mlp.up_proj.weight.detach(), merged) is alike


def test_export_names_modules_for_the_class_that_it_is_told(tmp_path: Path) -> None:
    whole = vision_model(VISION)
    whole.save_pretrained(tmp_path / "base")
    model = trained(dsub.load_frozen(tmp_path / "base", storage="fp32"), target_modules=["q_proj"])
    folder, ids = dsub.save_adapter(model, tmp_path / "own"), torch.arange(3, 12)[None]
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for told, reader in (("trained", text), ("checkpoint", whole)):
        assert main(["export", str(folder), str(tmp_path / told), "--for-class", told]) == 0
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("error", message=".*(missing adapter keys|Unexpected keyword)")
            theirs = peft.PeftModel.from_pretrained(reader, tmp_path / told).eval()
            assert near(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_merged_model_names_its_own_class_and_brings_its_own_code(tmp_path: Path) -> None:
    vision_model(VISION).save_pretrained(tmp_path / "base")
    model = trained(dsub.load_frozen(tmp_path / "base", storage="fp32"), target_modules=["q_proj"])
    model.config.architectures = [VISION]  # as the checkpoint's configuration has it
    dsub.merge(model, tmp_path / "text", report=None)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == [type(model).__name__]
    own = saved_base(tmp_path / "own")
    (own / "modeling_own.py").write_text("from transformers import LlamaForCausalLM as Own\n")
    described = json.loads((own / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (own / "config.json").write_text(json.dumps(described))
    dsub.merge(trained(reloaded(own)), tmp_path / "merged", report=None)
    assert (tmp_path / "merged" / "modeling_own.py").read_text() == (own / "modeling_own.py").read_text()


def test_export_prints_json_and_makes_the_rank_that_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_base(tmp_path / "base")
    folder = dsub.save_adapter(trained(frozen(base), "ssb"), tmp_path / "adapter")
    command = ["export", str(folder), str(tmp_path / "out"), "--approximate-rank", "5", "--json"]
    assert main([*command, "--base-model", str(base)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["form"], told["rank"]) == ("approximate", 5) and 0 < told["error"] < 1


def test_inspect_prints_nothing_beside_the_json_and_draws_where_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = dsub.save_adapter(trained(tiny_model()), tmp_path / "adapter"), tmp_path / "moved.png"
    assert main(["inspect", str(folder), "--json", "--picture", str(picture)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["method"] == "lora"
    assert printed.err.endswith(f"picture: {picture}\n") and picture.stat().st_size > 1000


def test_an_imported_adapter_knows_its_base_and_takes_no_other_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_base(tmp_path / "base")
    theirs = peft.get_peft_model(reloaded(base), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "peft")
    assert main(["import", str(tmp_path / "peft"), str(tmp_path / "own")]) == 0
    assert main(["merge", str(tmp_path / "own"), str(tmp_path / "merged")]) == 0
    other = reloaded(base)
    other.lm_head.weight.data.add_(1.0)
    other.save_pretrained(base)
    assert main(["merge", str(tmp_path / "own"), str(tmp_path / "other")]) == 2
    assert f"{base} is another model" in capsys.readouterr().err


def test_what_the_disk_refuses_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, in a process of its own."""
    folder = dsub.save_adapter(trained(tiny_model()), tmp_path / "adapter")
    ended = run_lines(
        "import resource, sys\nfrom dist_subspace.cli import main\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"sys.exit(main(['export', {str(folder)!r}, {str(tmp_path / 'out')!r}]))"
    )
    assert ended.returncode == 1, ended
    assert (
        ended.stderr.startswith("error: ")
        and "could not be written (" in ended.stderr
        and "File too large" in ended.stderr
    )
    assert ended.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"RANK": "0", "OMPI_COMM_WORLD_RANK": "1"}, True),
    ],
)
def test_rank_0_is_known_by_the_launchers_environment(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first
