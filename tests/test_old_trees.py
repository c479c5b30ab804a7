"""What earlier trees of this project wrote (tests/fixtures) loads, resumes and merges for ever.

The second tree's runs go on bit for bit. Other processors and libraries round otherwise, so a probe that none of our code
takes part in says whether bits can be compared here.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from dist_subspace import load_adapter, load_frozen, merge, methods
from dist_subspace.api import load_adapted
from dist_subspace.run_folder.status import EXIT_OK
from dist_subspace.training.run import train

FIXTURES = Path(__file__).parent / "fixtures"
FIRST, SECOND = FIXTURES / "first_tree", FIXTURES / "second_tree"
MODEL, RECORDS = FIRST / "model", FIRST / "train.jsonl"
ADAPTERS = [path for tree in (FIRST, SECOND) for path in sorted((tree / "adapters").iterdir())]
RUNS = [path for tree in (FIRST, SECOND) for path in sorted(tree.glob("run-*")) if path.is_dir()]


def named(path: Path) -> str:
    return f"{path.relative_to(FIXTURES).parts[0]}-{path.name}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads would add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def expected(tree: Path) -> dict[str, torch.Tensor]:
    return load_file(tree / "expected.safetensors")


@functools.cache
def same_arithmetic() -> bool:
    """Whether transformers' own gradients have here the bits that they had where the second tree was written."""
    if torch.cuda.is_available():
        return False
    ids = expected(SECOND)["ids"]
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        sums = torch.stack([gradients.sum(), gradients.abs().sum()])
        if not torch.equal(sums, expected(SECOND)[f"probe.{str(dtype).removeprefix('torch.')}"]):
            return False
    return True


def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1]


def check_logits(model: Any, adapter: Path, atol: float) -> None:
    written = expected(adapter.parents[1])
    torch.testing.assert_close(last_logits(model, written["ids"]), written[adapter.name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=named)
def test_an_adapter_of_an_old_tree_gives_the_logits_that_it_gave_then(adapter: Path) -> None:
    check_logits(load_adapter(load_frozen(MODEL, storage="fp32"), adapter), adapter, 1e-5)


@pytest.mark.parametrize("adapter", [path for path in ADAPTERS if methods()[path.name].mergeable], ids=named)
def test_an_adapter_of_an_old_tree_merges_into_what_it_was(adapter: Path, tmp_path: Path) -> None:
    merge(load_adapted(adapter, base_model=MODEL), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    check_logits(merged, adapter, 1e-4)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_a_run_of_an_old_tree_goes_on_as_if_nobody_had_stopped_it(run: Path, working_folder: Path) -> None:
    shutil.copytree(MODEL, "model")
    shutil.copytree(run, run.name)
    shutil.copy(RECORDS, working_folder)
    assert train(f"{run.name}/config.yaml") == EXIT_OK
    written, whole = lines_of(Path(run.name, "metrics.jsonl")), lines_of(run.with_name(f"{run.name}-whole.jsonl"))
    assert [line["step"] for line in written] == [line["step"] for line in whole]
    adapter = Path(run.name, "adapter")
    # The loss of a language model was made of whole logits in these trees: its gradient was rounded elsewhere.
    same = run.parent == FIRST or same_arithmetic()
    check_close(written, whole, rel=1e-4 if same else 1e-2)
    if run.parent == SECOND and same:
        check_near(load_file(adapter / "adapter_model.safetensors"), load_file(f"{run}-whole.safetensors"))
    load_adapter(
        load_frozen("model", storage=yaml.safe_load((run / "config.yaml").read_text())["model"]["storage"]), adapter
    )


def check_near(made: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert made.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-3, atol=2e-3, msg=name)


def check_close(made: list[dict[str, Any]], whole: list[dict[str, Any]], rel: float) -> None:
    for key in ("loss", "learning_rate", "eval_loss"):
        assert [line[key] for line in made if key in line] == pytest.approx(
            [line[key] for line in whole if key in line], rel=rel
        )
