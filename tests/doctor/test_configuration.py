"""A configuration's refusals are findings, its places are those of the run, and what it will write is computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_subspace as dsub
from dist_subspace.config import load_config
from dist_subspace.doctor.configuration import examine, judge, uses
from dist_subspace.doctor.needs import checkpoints_at_once, needs, needs_text
from tests.doctor.facts import ranks_of, sentences
from tests.tiny_run import make_model, make_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configuration")
    make_model(folder / "model")
    make_records(folder / "train.jsonl", 10)
    return folder


def config_file(folder: Path, **training: Any) -> str:
    values = {
        "model": {"path": str(folder / "model"), "storage": "nf4"},
        "subspace": {"method": "pissa", "rank": 4},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 64},
        "training": {"max_steps": 100, "global_batch_size": 12} | training,
        "checkpoint": {"save_steps": 10, "save_total_limit": 2},
        "run": {"output_dir": str(folder / "run"), "report_to": []},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_a_good_configuration_is_accepted_and_nothing_is_written(folder: Path) -> None:
    found = examine(config_file(folder), [], speaks=True, is_chair=True)
    assert found["refused"] == [] and found["needs"]["checkpoints"] == 3 and found["model"] is not None
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("subspace.method=nonsense", "subspace.method is 'nonsense'"),
        ("model.dtype=float16", None),
        ("training.optim=adamw_bnb_8bit", "training.optim"),
        ("data.max_length=1000000", "data.max_length is 1000000"),
        ("model.tokenizer=/nowhere", "/nowhere"),
    ],
)
def test_what_a_run_would_refuse_is_a_finding(folder: Path, override: str, sentence: str | None) -> None:
    found = examine(config_file(folder), [override], speaks=True, is_chair=True)
    if sentence is None:
        assert found["refused"] == []
        return
    assert len(found["refused"]) == 1 and sentence in found["refused"][0]
    ranks = ranks_of("configuration", [found])
    said = sentences(ranks, judge(ranks), breaks=True)
    assert len(said) == 1 and sentence in said[0]


def test_a_file_that_a_node_lacks_and_other_settings_are_named(folder: Path) -> None:
    here = examine(config_file(folder), [], speaks=True, is_chair=True)
    away = examine(str(folder / "none.yaml"), [], speaks=True, is_chair=False)
    other = examine(config_file(folder), ["training.seed=3"], speaks=False, is_chair=False)
    ranks = ranks_of("configuration", [here, away, other])
    said = sentences(ranks, judge(ranks), breaks=True)
    assert said[0].startswith(f"node2 (rank 1): the configuration '{folder}/none.yaml' cannot be read")
    assert said[1] == "node3 (rank 2): the configuration is another one than on node1 (rank 0)"


def test_micro_batches_that_are_empty_are_a_remark(folder: Path) -> None:
    found = examine(config_file(folder), [], speaks=False, is_chair=False)
    even, uneven = ranks_of("configuration", [found] * 3), ranks_of("configuration", [found] * 5)
    assert sentences(even, judge(even)) == []
    assert sentences(uneven, judge(uneven)) == [
        "everywhere: a step has 12 micro-batches, and 5 ranks compute 15, of which 3 are empty"
    ]


def test_the_bytes_of_a_checkpoint_are_those_of_adapter_and_optimizer(folder: Path) -> None:
    config = load_config(config_file(folder), ["subspace.method=lora"])
    model = dsub.attach(dsub.load_frozen(folder / "model"), dsub.SubspaceConfig(method="lora", rank=4))
    trained = sum(weight.numel() for weight in dsub.trainable_parameters(model))
    found = needs(config, folder / "model")
    assert found["checkpoint"] == 16 * trained and found["adapter"] == 4 * trained and found["factors"] == 0
    assert found["run"] == 3 * 16 * trained + 4 * trained + found["tokens"]  # type: ignore[operator]
    with_vectors = needs(load_config(config_file(folder)), folder / "model")
    assert with_vectors["factors"] > 0  # type: ignore[operator]
    assert "3 checkpoints of " in needs_text(found)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 3),
        (["checkpoint.save_total_limit=1"], 2),
        (["checkpoint.save_total_limit=null"], 10),
        (["checkpoint.save_steps=60"], 2),
        (["checkpoint.metric_for_best_model=loss"], 4),
        (["checkpoint.save_total_limit=null", "training.num_train_epochs=2"], None),
    ],
)
def test_the_checkpoints_that_lie_there_at_once(folder: Path, overrides: list[str], count: int | None) -> None:
    assert checkpoints_at_once(load_config(config_file(folder), overrides)) == count


def test_the_places_are_the_runs_own(folder: Path) -> None:
    places = {use.name: use for use in uses(load_config(config_file(folder)))}
    assert places["run folder"].path == str(folder / "run") and places["run folder"].writes == "rank 0"
    assert places["data"].path == str(folder / "train.jsonl") and places["data"].must_exist
    assert places["model"].path == str(folder / "model") and places["folder on the node"].writes == "each node"
    assert [use.name for use in uses(None)] == ["run folders", "hub cache", "temporary files"]
    assert uses(None)[0].path == os.path.abspath("runs")
