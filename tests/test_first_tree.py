"""What an early tree of this project wrote (tests/fixtures/first_tree) loads, resumes and merges for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dist_subspace import load_adapter, load_frozen, merge
from dist_subspace.api import load_adapted
from dist_subspace.run_folder.status import EXIT_OK
from dist_subspace.training.run import train

FIRST = Path(__file__).parent / "fixtures" / "first_tree"
ADAPTERS = sorted(path.name for path in (FIRST / "adapters").iterdir())
MERGEABLE = sorted(set(ADAPTERS) - {"prefix", "prompt"})


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIRST / "expected.safetensors")


def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1]


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_of_the_first_tree_gives_the_logits_that_it_gave_then(method: str, expected: Any) -> None:
    model = load_adapter(load_frozen(FIRST / "model", storage="fp32"), FIRST / "adapters" / method)
    torch.testing.assert_close(last_logits(model, expected["ids"]), expected[method], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", MERGEABLE)
def test_an_adapter_of_the_first_tree_merges_into_what_it_was(method: str, expected: Any, tmp_path: Path) -> None:
    merge(load_adapted(FIRST / "adapters" / method, base_model=FIRST / "model"), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(last_logits(merged, expected["ids"]), expected[method], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["run-dora", "run-pissa"])
def test_a_run_of_the_first_tree_goes_on_as_if_nobody_had_stopped_it(name: str, working_folder: Path) -> None:
    for part in ("model", name):
        shutil.copytree(FIRST / part, working_folder / part)
    shutil.copy(FIRST / "train.jsonl", working_folder)
    assert train(f"{name}/config.yaml") == EXIT_OK
    lines = [json.loads(line) for line in (working_folder / name / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (FIRST / f"{name}-whole.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == [1, 2, 3, 4]
    for key in ("loss", "learning_rate"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in whole], rel=1e-4)
    load_adapter(load_frozen("model", storage="nf4"), f"{name}/adapter")
