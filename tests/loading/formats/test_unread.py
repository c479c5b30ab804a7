"""Every format that transformers knows is read, or refused by its name before anything is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.formats.registry import read_methods
from dist_subspace.loading.formats.unread import NAMES
from tests.quantised_folders import refusals
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_config

METHODS = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}


def test_every_format_of_transformers_is_read_or_has_a_name() -> None:
    assert METHODS - set(read_methods()) - NAMES.keys() == set()
    assert set(read_methods()) & NAMES.keys() == set()


@pytest.mark.parametrize("method", [*NAMES, "another"])
def test_what_is_not_read_is_refused_by_name(method: str, tmp_path: Path) -> None:
    config = tiny_config("LlamaConfig").to_dict() | {"quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = re.escape(NAMES.get(method, "'another'"))
    with pytest.raises(
        UsageError, match=rf"quantised as {name} \(quantization_config.quant_method: {method}\)"
    ) as refusal:
        load_frozen(tmp_path, "nf4")
    assert "give the 16-bit model that it was made of" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_rank_refuses_every_format_before_it_reads_a_weight(tmp_path: Path) -> None:
    """There is none to be read."""
    folders = []
    for method in NAMES:
        (tmp_path / method).mkdir()
        config = tiny_config("LlamaConfig").to_dict() | {"quantization_config": {"quant_method": method}}
        (tmp_path / method / "config.json").write_text(json.dumps(config))
        folders.append(str(tmp_path / method))
    first, second = run_on_ranks(2, refusals, folders, "nf4")
    assert first == second
    for folder, name, said in zip(folders, NAMES.values(), first, strict=True):
        assert said is not None and said.startswith(
            f"model.path is {folder!r}, whose weights are quantised as {name} ("
        )


def test_a_format_without_a_name_is_refused(tmp_path: Path) -> None:
    config = tiny_config("LlamaConfig").to_dict() | {"quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UsageError, match=r"a format that quant_method does not name \(.*not given\), which is not read"
    ):
        load_frozen(tmp_path, "nf4")
