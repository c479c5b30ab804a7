"""What of a folder is pushed, and what of a repository an earlier push has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from dist_subspace.interchange.card_signature import is_unedited
from dist_subspace.interchange.model_card import NO_LICENSE, model_card
from dist_subspace.placement.collectives import world
from dist_subspace.publishing.card import published_card
from dist_subspace.publishing.contents import adapter_contents, kind_of, model_contents, outdated
from dist_subspace.publishing.repository import Repository
from tests.ranks import run_on_ranks
from tests.tiny_run import make_model

SSL = {
    "peft_type": None,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "a/b",
    "dist_subspace": {"method": "ssl"},
}
SCALINGS = {"peft_type": "IA3", "task_type": "CAUSAL_LM"}


def test_a_folder_of_neither_an_adapter_nor_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which holds neither an adapter nor a model"):
        model_contents(tmp_path)


def test_what_a_repository_holds_is_told_by_its_files() -> None:
    assert kind_of([".gitattributes", "README.md", "onnx/model.safetensors"]) is None
    assert kind_of(["adapter_config.json", "adapter_model.safetensors"]) == "adapter"
    assert kind_of(["config.json", "model.safetensors"]) == kind_of(["pytorch_model.bin"]) == "model"


def peft_form(adapter: Path, scratch: Path) -> dict[str, Any] | None:
    return adapter_contents(adapter, scratch).export if world().is_main else None


def test_the_form_for_peft_is_made_by_one_rank_that_nobody_waits_for(tmp_path: Path) -> None:
    """At the end of a run on several ranks the others are gone."""
    model = dsub.attach(
        dsub.load_frozen(make_model(tmp_path / "base", layers=1), storage="fp32"),
        dsub.SubspaceConfig(method="ssl", target_modules=("q_proj",)),
    )
    adapter = dsub.save_adapter(model, tmp_path / "adapter")
    described, nothing = run_on_ranks(2, peft_form, adapter, tmp_path / "scratch", timeout=30)
    assert described["peft_type"] == "IA3" and nothing is None


def test_of_an_earlier_push_goes_what_would_be_read_beside_the_new_one() -> None:
    old = [
        "README.md",
        "notes.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "labels.json",
    ]
    there = [*old, "model.safetensors.index.json", "peft/adapter_config.json", "images/a.png", "config.json"]
    assert outdated(there, ["config.json", "model.safetensors"]) == [*old[2:], *there[5:7]]
    assert outdated(there, there) == []


def test_the_card_in_a_repository_names_it_and_takes_the_license_of_the_base() -> None:
    card = model_card(SSL, {"steps": 3})
    assert NO_LICENSE in card and "subfolder" not in card
    published = published_card(
        card, "me/mine", SSL, SCALINGS, {"license": "other", "license_name": "llama9", "tags": ["x"]}
    )
    assert (
        is_unedited(published) and "license: other\nlicense_name: llama9" in published and NO_LICENSE not in published
    )
    assert 'PeftModel.from_pretrained(model, "me/mine", subfolder="peft")' in published and "| steps | 3 |" in published
    assert 'dsub.load_adapter(model, "me/mine")' in published and published.count("## How to load it") == 1


def test_what_a_person_has_written_stays_but_for_the_name_of_the_place() -> None:
    edited = model_card(SSL, {}).replace("tags:", "license: mit\ntags:").replace("# b with ssl", "# Mine")
    published = published_card(edited, "me/mine", SSL, SCALINGS, {"license": "other"})
    assert published == edited.replace("path/to/this/folder", "me/mine").replace(NO_LICENSE, "mit.")


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/a b", "-/x", ""])
def test_a_name_that_is_none_is_refused_before_the_hub_is_asked(name: str) -> None:
    with pytest.raises(UsageError, match="accepted: a name on the Hub, user/name"):
        Repository(name).check()
