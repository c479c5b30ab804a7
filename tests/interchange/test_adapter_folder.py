"""The one reader of adapter folders: how often a command opens each file, and what is read only when it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from dist_subspace.cli import main
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter_folder import AdapterFolder, read_adapter
from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS
from tests.interchange.opened import opens
from tests.interchange.trained import saved_base, trained

ONCE = {CONFIG: 1, OWN_CONFIG: 1, WEIGHTS: 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of it that PEFT reads and one that it does not (with factors)."""
    home = tmp_path_factory.mktemp("made")
    saved_base(home / "base")
    for method in ("lora", "pissa"):
        dsub.save_adapter(trained(dsub.load_frozen(home / "base", storage="fp32"), method), home / method)
    return home


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_merge_opens_each_file_of_the_adapter_once(method: str, made: Path, tmp_path: Path) -> None:
    with opens(made / method) as counts:
        assert main(["merge", str(made / method), str(tmp_path / "full")]) == 0
    assert counts == ONCE


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_so_do_an_export_a_report_and_a_load(method: str, made: Path, tmp_path: Path) -> None:
    folder = made / method
    for command in (["export", str(folder), str(tmp_path / "peft")], ["inspect", str(folder), "--json"]):
        with opens(folder) as counts:
            assert main(command) == 0
        assert counts == ONCE, command
    model = dsub.load_frozen(made / "base", storage="fp32")
    with opens(folder) as counts:
        dsub.load_adapter(model, folder)
    assert counts == ONCE


@pytest.mark.parametrize("base", [False, True])
def test_an_import_opens_each_file_of_pefts_once(base: bool, made: Path, tmp_path: Path) -> None:
    theirs = dsub.export_peft(made / "lora", tmp_path / "peft", report=None).folder
    with opens(Path(theirs)) as counts:
        arguments = ["--base-model", str(made / "base")] if base else []
        assert main(["import", theirs, str(tmp_path / "own"), *arguments]) == 0
    assert counts == {CONFIG: 1, WEIGHTS: 1}


def test_tensors_are_read_when_they_are_asked_for(made: Path) -> None:
    adapter = AdapterFolder(made / "pissa")
    key = next(key for key in adapter.keys if key.endswith("lora_A.weight"))
    layer = adapter.layers[0]
    assert adapter.shape(key) == list(adapter.tensor(key).shape)
    assert set(adapter.suffixes(layer)) == {"lora_A.weight", "lora_B.weight"}
    assert set(adapter.factors(layer)) == {"lora_A0", "lora_B0"}
    trained_alone, every = adapter.tensors(factors=False), read_adapter(made / "pissa").tensors
    assert trained_alone.keys() < every.keys() and len(every) == 2 * len(trained_alone)
    assert all(torch.equal(tensor, every[key]) for key, tensor in trained_alone.items())


def test_a_folder_lacks_an_adapter_by_the_same_words_on_every_way(made: Path, tmp_path: Path) -> None:
    for missing in (CONFIG, WEIGHTS):
        folder = tmp_path / missing
        shutil.copytree(made / "lora", folder)
        (folder / missing).unlink()
        for way in (AdapterFolder, read_adapter):
            with pytest.raises(UsageError, match=f"holds no adapter; looked for {CONFIG} and {WEIGHTS}"):
                way(folder)


def test_a_cut_file_is_said_by_the_same_words_on_every_way(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "lora", tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).write_bytes((made / "lora" / WEIGHTS).read_bytes()[:-10])
    for way in (AdapterFolder, read_adapter):
        with pytest.raises(
            UsageError, match=rf"holds no whole adapter because {WEIGHTS} is no whole .*; copy it again"
        ):
            way(tmp_path / "cut")


def test_an_adapter_of_peft_has_no_configuration_of_ours(made: Path, tmp_path: Path) -> None:
    adapter = AdapterFolder(dsub.export_peft(made / "lora", tmp_path / "peft", report=None).folder)
    assert adapter.ours == {} and adapter.described["peft_type"] == "LORA" and adapter.layers == []
    with pytest.raises(UsageError, match="was not written by dist_subspace"):
        _ = adapter.config
