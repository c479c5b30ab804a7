"""A file that a disk has changed, cut, or lost is noticed when it is read: refused in one sentence, or made again where it is a
cache. What a run leaves can be read by others than its owner."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_subspace as dsub
from dist_subspace.checkpoint.state import find_checkpoint
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder, read_adapter
from dist_subspace.run_folder.status import EXIT_OK
from dist_subspace.training.data import DataSettings
from dist_subspace.training.data.encoding import Encoder
from dist_subspace.training.data.pieces import Pieces, tokenised
from dist_subspace.training.data.store import read_columns
from dist_subspace.training.run import train
from tests.tiny_run import make_model, make_records
from tests.training.data.tokens_for_tests import char_tokenizer, prepared
from tests.whole_runs import two_kept_configuration

LEFT = (".checkpoint-9.partial", ".checkpoint-8.removed", ".adapter.partial")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, records, and `run`, which has gone its four steps and kept its checkpoints 2 and 4. It began where
    a killed run had left what it was writing and deleting."""
    folder = tmp_path_factory.mktemp("damage")
    make_model(folder / "model", layers=1)
    make_records(folder / "train.jsonl", 24)
    for name in LEFT:
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / "trainer_state.json").write_text("{}")
    before = os.umask(0o022)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert train(two_kept_configuration(folder, folder / "run")) == EXIT_OK
    finally:
        os.umask(before)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def damaged(file: Path, places: int = 12, first: int | None = None) -> Iterator[int]:
    """The file with one bit turned in it, at one place after another; at the end it is as it was.

    Arguments:
        first: of the file's bytes, in which the places are; unset: all.
    """
    whole = file.read_bytes()
    size = min(first or len(whole), len(whole))
    draws = random.Random(file.name)
    for place in sorted({0, size // 2, size - 1, *draws.sample(range(size), min(places, size))}):
        turned = whole[place] ^ draws.choice((1, 32, 128))
        file.write_bytes(whole[:place] + bytes([turned]) + whole[place + 1 :])
        yield place
    file.write_bytes(whole)


def refusal(read: Callable[[], Any]) -> str | None:
    """The sentence in which the product refuses; None where it reads."""
    try:
        read()
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_for_an_older_one(run: Path) -> None:
    newest = run / "checkpoint-4"
    for file in sorted(newest.iterdir()):
        for place in damaged(file, 3):
            told = refusal(lambda: find_checkpoint(run, str(newest), print))
            assert told is not None and "which is no whole checkpoint: checkpoint-4" in told, (file.name, place)
            said: list[str] = []
            found = find_checkpoint(run, "auto", said.append)
            assert found is not None and found[0] == run / "checkpoint-2" and found[1].step == 2
            assert len(said) == 1 and "checkpoint-4 is damaged and skipped" in said[0]


def test_the_adapter_of_a_damaged_checkpoint_is_not_read(run: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "dist_subspace.json"):
        for place in damaged(run / "checkpoint-4" / name):
            assert refusal(lambda: read_adapter(run / "checkpoint-4")), (name, place)
    assert refusal(lambda: read_adapter(run / "checkpoint-4")) is None


def test_factors_that_are_not_those_of_the_checkpoint_are_not_read_with_it(run: Path) -> None:
    (file,) = (run / "factors").iterdir()
    for place in damaged(file):
        assert file.name in str(refusal(lambda: read_adapter(run / "checkpoint-4"))), place
    file.unlink()
    assert file.name in str(refusal(lambda: read_adapter(run / "checkpoint-4")))


def test_an_adapters_damaged_file_is_one_sentence_or_an_adapter(run: Path) -> None:
    """An adapter apart from a checkpoint has no manifest; whatever its files have become, nothing else is raised."""
    adapter, refused = run / "adapter", 0
    for name, first in (
        ("adapter_model.safetensors", 300),
        ("adapter_config.json", None),
        ("dist_subspace.json", None),
    ):
        for _ in damaged(adapter / name, 60, first):
            refused += refusal(lambda: (read_adapter(adapter), AdapterFolder(adapter).without_tensors())) is not None
        whole = (adapter / name).read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 2):
            (adapter / name).write_bytes(whole[:size])
            assert refusal(lambda: read_adapter(adapter)), (name, size)
        (adapter / name).write_bytes(whole)
    assert refused > 60


def test_a_damaged_factor_file_is_one_sentence_or_is_made_again(finished: Path, tmp_path: Path) -> None:
    """Without a checkpoint that knows its hash."""
    cache = tmp_path / "factors"
    config = dsub.SubspaceConfig(method="pissa", rank=2, target_modules=["q_proj"])

    def attach() -> None:
        dsub.attach(dsub.load_frozen(finished / "model", storage="fp32", device="cpu"), config, cache=cache)

    attach()
    (file,) = cache.iterdir()
    whole, told = file.read_bytes(), []
    header = 8 + int.from_bytes(whole[:8], "little")
    named = whole.index(b"lora_A0")  # a name that is another one, which safetensors does not notice
    for place in (0, 8, named, header - 40):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        told.append(refusal(attach))
        assert told[-1] is not None or file.read_bytes() == whole
        file.write_bytes(whole)
    assert "lacks 'lora_A0' of model.layers.0.self_attn.q_proj: it is damaged; delete it" in str(told[2])


def test_damaged_tokens_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "text {n}", "label": "{n % 3}"}}' for n in range(40)))
    settings: dict[str, Any] = {"train": str(tmp_path / "a.jsonl"), "format": "classification"}
    prepared(tmp_path, **settings)
    (folder,) = (tmp_path / "cache").iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for file in sorted(folder.iterdir()):
        for place in damaged(file, 25):
            found = read_columns(folder)
            if found is not None:  # the digests' own name in the JSON: what it says is whole
                assert file.name == "columns.json" and b'"digests"' not in file.read_bytes(), (file.name, place)
    (folder / "ids.npy").write_bytes(whole["ids.npy"][:-4] + b"\1\0\0\0")
    prepared(tmp_path, **settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    kept = folder / "columns.json"
    kept.write_bytes(kept.read_bytes().partition(b',\n "digests"')[0] + b"\n}")  # as it was written before
    assert np.array_equal(read_columns(folder).ids, np.load(folder / "ids.npy"))  # type: ignore[union-attr]


def test_a_damaged_piece_of_a_stopped_tokenisation_is_never_taken_for_another(tmp_path: Path) -> None:
    pieces, settings = Pieces(tmp_path, "key"), DataSettings(train="a", format="text")
    rows = [{"text": f"hello {n}"} for n in range(3)]
    pieces.open()
    pieces.put(0, tokenised(rows, 1, "a", settings, Encoder(char_tokenizer())))
    (file,) = pieces.folder.iterdir()
    (whole,) = pieces.all(1)
    refused = 0
    for place in damaged(file, 400):
        if not pieces.has(0):
            refused += 1
            continue
        (found,) = pieces.all(1)
        assert all(np.array_equal(found[name], whole[name]) for name in whole), place
    assert refused > 200


def test_what_a_killed_run_left_is_cleared_away_and_never_taken_for_a_checkpoint(finished: Path) -> None:
    hidden = {path.name for path in (finished / "run").iterdir() if path.name.startswith(".")}
    assert hidden == {".lock"}
    assert {path.name for path in (finished / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_what_a_run_leaves_can_be_read_by_others(finished: Path) -> None:
    """safetensors and tempfile give what they make to its owner alone."""
    paths = [path for path in (finished / "run").rglob("*") if not path.name.startswith(".")]
    closed = [path for path in paths if path.stat().st_mode & 0o777 != (0o755 if path.is_dir() else 0o644)]
    assert len(paths) > 30 and not closed


def test_a_file_that_cannot_be_read_is_one_sentence(run: Path) -> None:
    """A folder stands in its place: no user, root included, reads one as a file."""
    for place, name in (("checkpoint-4", "optimizer.safetensors"), ("checkpoint-2", "MANIFEST.json")):
        (run / place / name).unlink()
        (run / place / name).mkdir()
        assert "no whole checkpoint" in str(refusal(partial(find_checkpoint, run, str(run / place), print)))
    for name in ("adapter_model.safetensors", "dist_subspace.json", "adapter_config.json"):
        whole = (run / "adapter" / name).read_bytes()
        (run / "adapter" / name).unlink()
        (run / "adapter" / name).mkdir()
        assert name in str(refusal(lambda: read_adapter(run / "adapter"))), name
        (run / "adapter" / name).rmdir()
        (run / "adapter" / name).write_bytes(whole)
    assert torch.is_tensor(next(iter(read_adapter(run / "adapter").tensors.values())))
