"""An adapter that is opened computes what the trained model computed, wherever its weights lie; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

from dist_subspace.adapted.opened import open_adapted
from dist_subspace.errors import UsageError
from dist_subspace.placement.engines import preset_for_use
from dist_subspace.placement.tensors import is_split
from tests.ranks import run_on_ranks
from tests.talking.folders import run_folder
from tests.tiny_run import make_model

IDS = torch.arange(3, 12)[None]


def logits(run: str, preset: str | None) -> tuple[bool, str, torch.Tensor]:
    """Collective: whether the model is split, its placement, and what it says."""
    opened = open_adapted(run, preset=preset)
    with torch.no_grad():
        seen = is_split(opened.model), opened.preset, opened.model(input_ids=IDS).logits.clone()
    opened.close()
    return seen


def test_a_run_is_opened_as_it_was_trained_on_one_rank_and_on_two(tmp_path: Path) -> None:
    run = str(run_folder(tmp_path))
    split, preset, alone = logits(run, None)
    assert (split, preset) == (False, "none")
    for seen_split, seen_preset, seen in run_on_ranks(2, logits, run, None):
        assert (seen_split, seen_preset) == (True, "zero3") and torch.allclose(seen, alone, atol=1e-6)
    assert [(s, p) for s, p, _ in run_on_ranks(2, logits, run, "zero0")] == [(False, "zero0")] * 2


def test_an_adapter_of_peft_is_opened_on_the_base_that_it_names(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    opened = open_adapted(tmp_path / "peft", storage="fp32")
    with torch.no_grad():
        assert torch.allclose(opened.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5)
    with pytest.raises(UsageError, match="does not say how its prompts are written"):
        opened.settings()
    assert opened.settings(format="completion").format == "completion"


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    with pytest.raises(UsageError, match="which is another model than the one that"):
        open_adapted(run, base_model=make_model(tmp_path / "other", seed=1, layers=1))
    with pytest.raises(UsageError, match="preset is 'zero5'"):
        open_adapted(run, preset="zero5")


@pytest.mark.parametrize(
    ("preset", "given", "ranks", "expected"),
    [
        ("zero3", None, 1, "none"),
        ("zero3-hpz", None, 4, "zero3"),
        ("zero2-offload", None, 2, "zero0"),
        ("zero3-offload", None, 1, "zero3-offload"),
        ("zero3-nvme", None, 2, "zero3-nvme"),
        (None, None, 2, "zero0"),
        ("zero2", {"zero_optimization": {"stage": 3}}, 2, "zero3"),
        ("zero2", {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, 2, "zero3-offload"),
    ],
)
def test_weights_lie_as_in_training_without_what_is_trained(
    preset: str | None, given: dict[str, object] | None, ranks: int, expected: str
) -> None:
    assert preset_for_use(preset, given, ranks) == expected
