"""Where tokens lie, who makes them, and what a node with other data hears. Nodes are working folders and host names here."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from dist_subspace.config import load_config
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.training.prepared_data import prepare_data
from tests.named_hosts import named_host
from tests.ranks import run_on_ranks
from tests.tiny_run import make_records, make_tokenizer


def node(folder: Path, count: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    make_records(folder / "train.jsonl", count)
    make_records(folder / "eval.jsonl", 5)
    return folder


def prepared(nodes: list[Path], seen: list[bool], data: dict[str, Any]) -> str | tuple[str, int]:
    """Rank r stands on node r, and is its first rank: what a refusal says, or the fingerprint and how many samples."""
    own = nodes[world().rank]
    given = {"train": "train.jsonl", "max_length": 48} | data
    if isinstance(given["train"], list) and world().rank:
        given["train"] = given["train"][:1]
    config = load_config({"model": {"path": "x"}, "data": given, "run": {"output_dir": "run", "local_dir": "local"}})
    before = os.environ["LOCAL_RANK"]
    with contextlib.chdir(own), named_host(own.name):
        os.environ["LOCAL_RANK"] = "0"
        try:
            data = prepare_data(config, make_tokenizer(), seen)
        except UsageError as error:
            return str(error)
        finally:
            os.environ["LOCAL_RANK"] = before
        return data.fingerprint, len(data.train)


def tokens(node: Path) -> list[str]:
    """The folders of tokens of a node, without what they are called for."""
    found = [path.parent.parent for path in node.rglob("columns.json")]
    return sorted(str(path.relative_to(node)).split("-")[0] for path in found)


def test_each_node_makes_its_own_where_it_does_not_see_rank_0_s(tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    first, second = run_on_ranks(2, prepared, nodes, [True, False], {})
    assert first == second and first[1] == 20
    assert [tokens(folder) for folder in nodes] == [["run/tokens"], ["local/run"]]


def test_one_makes_them_for_all_that_see_them_and_the_others_read_no_data(tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    (nodes[1] / "run").symlink_to(nodes[0] / "run")
    (nodes[1] / "train.jsonl").unlink()
    first, second = run_on_ranks(2, prepared, nodes, [True, True], {})
    assert first == second and tokens(nodes[0]) == ["run/tokens"] and tokens(nodes[1]) == []


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_is_looked_at_for_itself(shared: bool, tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    (nodes[0] / "cache").mkdir()
    if shared:
        (nodes[1] / "cache").symlink_to(nodes[0] / "cache")
        (nodes[1] / "train.jsonl").unlink()
    first, second = run_on_ranks(2, prepared, nodes, [True, not shared], {"cache_dir": "cache"})
    assert first == second
    assert [(folder / "cache").is_dir() for folder in nodes] == [True, True]
    assert not (nodes[1] / "local").exists() and not (nodes[0] / "run").exists()


def test_a_rank_that_does_not_find_what_was_made_for_it_says_so(tmp_path: Path) -> None:
    """It was said to see the folder, and does not."""
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    first, second = run_on_ranks(2, prepared, nodes, [True, True], {})
    assert first == second and isinstance(first, str)
    assert first.startswith(
        "on node2 (rank 1): data.train is 'train.jsonl', whose tokens were just made, and this rank on node2 "
    )


@pytest.mark.parametrize("field", ["train", "eval"])
def test_a_node_with_other_data_is_named_with_its_file(field: str, tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2", "node3")]
    make_records(nodes[2] / f"{field}.jsonl", 7)
    said = run_on_ranks(3, prepared, nodes, [True, False, False], {"eval": "eval.jsonl"})
    assert (
        said
        == [
            f"data.{field} is '{field}.jsonl' on node3 (rank 2), which holds other data than '{field}.jsonl' on node1 (rank 0); "
            "accepted: the same data on every node"
        ]
        * 3
    )


def test_a_node_without_the_data_is_named(tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    (nodes[1] / "train.jsonl").unlink()
    said = run_on_ranks(2, prepared, nodes, [True, False], {})
    assert said == ["on node2 (rank 1): data.train is 'train.jsonl'; there is no such file"] * 2


def test_a_rank_with_another_list_of_files_is_named(tmp_path: Path) -> None:
    nodes = [node(tmp_path / name) for name in ("node1", "node2")]
    said = run_on_ranks(2, prepared, nodes, [True, True], {"train": [{"path": "train.jsonl"}, {"path": "eval.jsonl"}]})
    assert said[0] == said[1]
    assert said[0].startswith(
        "rank 1 on node2 has another number of files in data.train than rank 0 on node1: 1, and not 2;"
    )
