"""What one rank alone sees is decided by all alike: every rank takes the same decision, and which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.run_folder.status import read_status
from tests.faults import decisions
from tests.faults.scenes import Home
from tests.forked_ranks import Ended, report, run_ranks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("decisions"))


@pytest.fixture(scope="module")
def own(home: Home) -> Home:
    """With a model whose class its user has written."""
    shutil.copytree(home.folder / "model", home.folder / "own")
    decisions.own_model(home.folder / "own")
    return home


def ended_alike(ended: list[Ended], status: int, *words: str) -> None:
    """Every rank left with this status, and one of them said why."""
    shown = report(ended)
    assert [rank.status for rank in ended] == [status] * len(ended), shown
    sentences = [line for rank in ended for line in rank.errors]
    assert len(sentences) == bool(words), shown
    assert all(word in sentences[0] for word in words), shown


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["zero0", "zero2"])
@pytest.mark.parametrize("how", ["nan", "infinite gradient"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(how: str, preset: str, own: Home) -> None:
    run = f"{how}-{preset}"
    ended = own.run(
        "own", run, f"deepspeed.preset={preset}", before={1: (decisions.misbehaves, how)}
    )  # of four samples in two micro-batches, rank 1 has the second
    ended_alike(ended, 0)
    status = read_status(own.folder / run)
    assert status is not None and status["skipped"] == 1, report(ended)
    assert [line["loss"] is None for line in lines(own.folder / run)] == [False, how == "nan"]


def test_a_user_s_own_model_that_raises_on_one_rank_ends_all_with_its_sentence(own: Home) -> None:
    ended = own.run("own", "raise", before={1: (decisions.misbehaves, "raise")})
    ended_alike(ended, 1, "RuntimeError: this model's own fault")
    assert (own.folder / "raise" / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (decisions.is_told_to_stop, "signal SIGTERM"),
        (decisions.has_a_clock_that_runs_ahead, "the end of training.max_time"),
    ],
)
def test_one_rank_that_shall_stop_stops_all_after_the_same_step(before: Any, reason: str, home: Home) -> None:
    run = before.__name__
    file = home.folder / run / "metrics.jsonl"
    ended = home.run("long", run, before={1: (before, str(file))})
    ended_alike(ended, 75)
    status = read_status(home.folder / run)
    assert status is not None and status["state"] == "interrupted" and reason in status["message"], report(ended)
    assert 0 < status["step"] < 2000 and (home.folder / run / f"checkpoint-{status['step']}").is_dir()
    assert [f"interrupted by {reason}" in rank.output for rank in ended] == [True, False], report(ended)


def test_only_rank_0_reads_a_checkpoint_and_writes_where_folders_differ(home: Home) -> None:
    """What lies on the other disk is an older copy of the run, whose values are others."""
    there = decisions.another_disk(home, "node-of-rank-1")
    home.copy("lora-fa", "goes-on")
    shutil.copytree(home.folder / "goes-on", there / "goes-on")
    (there / "goes-on" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    before = files(there / "goes-on")
    ended_alike(home.run("frozen", "goes-on", before={1: (decisions.is_elsewhere, str(there))}), 0)
    assert [line["step"] for line in lines(home.folder / "goes-on")] == [1, 2], "rank 0's run went on after step 1"
    assert files(there / "goes-on") == before


def test_checkpoints_that_only_another_rank_sees_are_not_forgotten_without_a_word(home: Home) -> None:
    there = decisions.another_disk(home, "has-the-run")
    home.copy("lora-fa", "behind")  # which is one step behind
    for run in ("behind", "moved"):
        shutil.copytree(home.folder / "runs" / "lora-fa", there / run)
    before = {run: files(there / run) for run in ("behind", "moved")}
    elsewhere = {1: (decisions.is_elsewhere, str(there))}
    words = ("(rank 1) has checkpoint-2 and", "where rank 0 is, has")
    ended_alike(home.run("fresh", "moved", before=elsewhere), 2, "run.output_dir is 'moved'", *words, "has none;")
    ended_alike(home.run("frozen", "behind", before=elsewhere), 2, *words, "has nothing after checkpoint-1;")
    assert not (home.folder / "moved" / "metrics.jsonl").exists()
    ended_alike(home.run("plain", "moved", "checkpoint.resume=none", before=elsewhere), 0)
    assert {run: files(there / run) for run in before} == before


def test_tokens_lie_once_where_the_ranks_see_one_disk_and_else_on_each_node(home: Home) -> None:
    there = decisions.another_disk(home, "has-its-own-tokens")
    ended_alike(home.run("fresh", "apart", before={1: (decisions.is_elsewhere, str(there))}), 0)
    (own,) = (there / "local").iterdir()
    assert own.name.startswith("apart-") and own.stat().st_mode & 0o777 == 0o700
    assert [token_files(folder) for folder in (own, home.folder / "apart")] == [token_files(own)] * 2
    assert token_files(own) and not (there / "apart").exists()
    assert not list(home.folder.glob("local/apart-*/tokens"))
    ended_alike(home.run("plain", "apart-with-a-cache", before={1: (decisions.is_elsewhere, str(there))}), 0)
    assert (there / "tokens").is_dir() and not (home.folder / "apart-with-a-cache" / "tokens").exists()


def test_a_node_that_sees_rank_0_s_tokens_needs_no_data(home: Home) -> None:
    """Neither its own records nor, where it is the first rank of its node, any work on them."""
    there = decisions.another_disk(home, "sees-the-run")
    (there / "seen").symlink_to(home.folder / "seen")
    (there / "train.jsonl").unlink()
    ended_alike(home.run("fresh", "seen", before={1: (decisions.is_elsewhere, str(there))}), 0)
    assert not list(there.glob("local/*/tokens"))


def token_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tokens").iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_rate(folder: Path) -> str:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    return "rank 1 has another training.learning_rate than rank 0: 0.02, and not 0.01"


def no_config(folder: Path) -> str:
    (folder / "config.yaml").unlink()
    return "the configuration 'config.yaml' cannot be read (No such file or directory)"


def other_records(folder: Path) -> str:
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    return "data.train is 'train.jsonl' on "


def other_records_to_evaluate_on(folder: Path) -> str:
    (folder / "eval.jsonl").write_text((folder / "train.jsonl").read_text())
    return "data.eval is 'eval.jsonl' on "


def no_records(folder: Path) -> str:
    (folder / "train.jsonl").unlink()
    return "data.train is 'train.jsonl'; there is no such file"


def another_tokenizer(folder: Path) -> str:
    file = folder / "model" / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(described))
    return "rank 1 has another tokenizer than rank 0"


def a_bad_record(folder: Path) -> str:
    (folder / "train.jsonl").write_text("no JSON\n")
    return "train.jsonl"


def other_weights(folder: Path) -> str:
    shutil.copy(folder.parent / "broken" / "model.safetensors", folder / "model" / "model.safetensors")
    return "rank 1 has another model fingerprint than rank 0"


def half_the_weights(folder: Path) -> str:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors"


def a_tokenizer_that_is_none(folder: Path) -> str:
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer.json").mkdir()
    return "tokenizer"


def another_stock_json(folder: Path) -> str:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("preset: zero0", "preset: zero0\n  config: stock.json"))
    (folder / "stock.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return "rank 1 has another deepspeed.config than rank 0"


DISKS = (
    *(no_config, other_rate, a_tokenizer_that_is_none, another_tokenizer, no_records, a_bad_record, other_records),
    *(other_records_to_evaluate_on, half_the_weights, other_weights, another_stock_json),
)


@pytest.mark.parametrize("spoil", DISKS, ids=lambda spoil: spoil.__name__)
def test_a_rank_whose_disk_holds_something_else_is_named_and_nothing_is_trained(spoil: Any, home: Home) -> None:
    there = decisions.another_disk(home, f"with-{spoil.__name__}")
    sentence = spoil(there)
    evaluated = ("data.eval=eval.jsonl",)
    ended = home.run("fresh", spoil.__name__, *evaluated, before={1: (decisions.is_elsewhere, str(there))})
    ended_alike(ended, 2, sentence)
    assert not (home.folder / spoil.__name__ / "metrics.jsonl").exists()
    assert not (there / spoil.__name__).exists(), "only rank 0 writes the run's folder"


def test_a_package_that_one_rank_lacks_is_missed_by_all(home: Home) -> None:
    ended = home.run("fresh", "lacks", "run.report_to=tensorboard", before={1: (decisions.lacks, "tensorboard")})
    ended_alike(ended, 2, "tensorboard")


def test_a_screen_that_takes_no_more_on_rank_0_ends_all(home: Home) -> None:
    file = home.folder / "screen" / "metrics.jsonl"
    ended = home.run("long", "screen", before={0: (decisions.has_a_full_screen, str(file))})
    ended_alike(ended, 1, "No space left on device")


def test_a_name_that_is_a_folder_for_one_rank_alone_is_fetched_by_all(home: Home) -> None:
    there = decisions.another_disk(home, "has-it")
    (there / "own").mkdir()
    shutil.copytree(home.folder / "model", there / "own" / "model")
    call = (decisions.fetches_where_one_rank_has_it, [str(home.folder), str(there)])
    ended = run_ranks([call, call], home.folder)
    assert [rank.status for rank in ended] == [0, 0], report(ended)
    assert all("error: model.path is 'own/model'" in rank.output for rank in ended), report(ended)


def test_factors_that_only_rank_0_has_are_everyone_s(home: Home) -> None:
    there = decisions.another_disk(home, "without-factors")
    home.copy("pissa", "with-factors")
    made = files(home.folder / "with-factors" / "factors")
    ended_alike(home.run("pissa-again", "with-factors", before={1: (decisions.is_elsewhere, str(there))}), 0)
    assert files(home.folder / "with-factors" / "factors") == made
    assert not (there / "with-factors").exists()


def test_what_all_ranks_refuse_alike_is_said_once(home: Home) -> None:
    ended = home.run("plain", "alike", "checkpoint.metric_for_best_model=accuracy")
    ended_alike(ended, 2, "checkpoint.metric_for_best_model is 'accuracy'")


def test_a_rank_that_is_busy_leaves_with_one_that_has_said_why_the_run_ends(own: Home) -> None:
    before = {0: (decisions.works_for_hours,), 1: (decisions.misbehaves, "raise")}
    ended_alike(own.run("own", "busy", before=before), 1, "RuntimeError: this model's own fault")
