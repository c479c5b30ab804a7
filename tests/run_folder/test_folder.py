"""What is in a run's folder has its name in one file, and every file of the package asks that one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_subspace.run_folder import CheckpointFolder, RunFolder
from dist_subspace.run_folder.folder import adapter_labels, checkpoint_name
from tests.ranks import ROOT

PACKAGE = ROOT / "dist_subspace"
OWNER = "run_folder/folder.py"
# Nothing else is called so: the names may be part of no text, but for a docstring and the help of a key.
DISTINCT = (
    *("config.yaml", "metrics.jsonl", "status.json", "loss.png", "labels.json", ".writable", "set-aside"),
    *("MANIFEST.json", "trainer_state.json", "optimizer.safetensors", "checkpoint-"),
)
# Words that mean other things, too: they may be no part of a path.
WORDS = ("adapter", "factors", "tokens", "tensorboard", ".lock")
JOINS = ("joinpath", "with_name", "Path")


def paths_named(source: str) -> list[str]:
    """Names of a run's folder in this source, as line and text."""
    tree = ast.parse(source)
    prose = set(map(id, _prose(tree)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [(node.lineno, node.value) for name in DISTINCT if name in node.value]
        for part in _path_parts(node):
            found += [(part.lineno, str(part.value)) for name in WORDS if part.value == name]
    return [f"{line}: {text!r}" for line, text in found]


def _prose(tree: ast.AST) -> Iterator[ast.AST]:
    """Docstrings, and what a key's `description` or an option's `help` says."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            yield from (each.value for each in body if isinstance(each, ast.Expr))
        if isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            yield from ast.walk(node.value)


def _path_parts(node: ast.AST) -> list[ast.Constant]:
    parts: list[ast.expr] = []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        parts = [node.right]
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        parts = node.args if name in JOINS else []
    return [part for part in parts if isinstance(part, ast.Constant)]


@pytest.mark.parametrize("path", sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")))
def test_no_other_file_names_what_is_in_a_run(path: str) -> None:
    assert path == OWNER or paths_named((PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        'run / "config.yaml"',
        'raise ValueError("it has no metrics.jsonl")',
        'f"from checkpoint-{step}"',
        'f"{run}/.checkpoint-{step}.partial"',
        'plan.run_dir / "adapter"',
        'folder.joinpath("factors")',
        'os.open(Path(run, ".lock"), flags)',
    ],
)
def test_a_name_of_a_run_outside_its_file_is_found(source: str) -> None:
    assert len(paths_named(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""RUN/config.yaml is read here."""',
        'Field(description="beside metrics.jsonl")',
        'described["factors"]',
        'kinds = ("adapter", "tokens")',
        "run.config",
    ],
)
def test_what_only_speaks_of_a_run_passes(source: str) -> None:
    assert paths_named(source) == []


def test_a_run_and_a_checkpoint_have_these_files(tmp_path: Path) -> None:
    run, checkpoint = RunFolder(tmp_path), CheckpointFolder(tmp_path / "checkpoint-7")
    named = {
        **{"config": "config.yaml", "metrics": "metrics.jsonl", "status": "status.json", "lock": ".lock"},
        **{"probe": ".writable", "picture": "loss.png", "adapter": "adapter", "factors": "factors", "tokens": "tokens"},
        "tensorboard": "tensorboard",
    }
    for name, expected in named.items():
        assert getattr(run, name) == tmp_path / expected
    assert run.checkpoint(7) == checkpoint.path and checkpoint_name(7) == "checkpoint-7"
    assert run.hidden_checkpoint(7, "partial") == tmp_path / ".checkpoint-7.partial"
    assert run.set_aside(3, "T") == tmp_path / "set-aside-3-T" and run.set_aside(3, "T", 2).name == "set-aside-3-T-2"
    assert checkpoint.manifest == checkpoint.path / "MANIFEST.json"
    assert checkpoint.trainer_state == checkpoint.path / "trainer_state.json"
    assert checkpoint.optimizer == checkpoint.path / "optimizer.safetensors"
    assert adapter_labels(run.adapter) == tmp_path / "adapter" / "labels.json"
    assert CheckpointFolder(run.hidden_checkpoint(7, "removed")).step is None and checkpoint.step == 7


def test_a_checkpoint_knows_its_run_through_links_and_dots(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    for written in (
        run / "checkpoint-1",
        tmp_path / "link" / "checkpoint-1",
        run / "checkpoint-1" / ".." / "checkpoint-1",
    ):
        assert RunFolder(tmp_path / "link").holds(written)
        assert CheckpointFolder(written).run.path == run.resolve()
    assert not RunFolder(tmp_path).holds(run / "checkpoint-1")


def test_a_run_folder_is_taken_where_a_path_is(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert Path(run) == tmp_path == RunFolder(run).path and str(run) == str(tmp_path)
    assert (
        RunFolder(tmp_path / "absent").checkpoints() == {}
        and RunFolder(tmp_path / "absent").steps_with_leftovers() == []
    )
