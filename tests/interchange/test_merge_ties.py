"""A merged model's tied parameters are what a reader of its folder gets, also where some are no longer tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_subspace as dsub
from tests.loading.untied import CASES, pairs, reference, save_untied
from tests.tiny_models import logits


def merged(base: Path, case: str, out: Path, **fields: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The adapted model, and what transformers reads from its merged folder."""
    model = dsub.load_frozen(base, storage="fp32", task=CASES[case][1])
    model = dsub.attach(model, dsub.SubspaceConfig(method="lora", rank=2, **fields))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    dsub.merge(model, out, report=None)
    return model.eval(), reference(out, case)


@pytest.mark.parametrize("case", ["llama", "bert", "flan", "umt5", "bart"])
@pytest.mark.parametrize("which", [-1, 0, None], ids=["last", "first", "all"])
def test_what_the_file_did_not_tie_is_not_tied_in_the_merged_folder(
    case: str, which: int | None, tmp_path: Path
) -> None:
    tied = list(pairs(case))
    save_untied(tmp_path / "base", case, tied if which is None else [tied[which]])
    model, again = merged(tmp_path / "base", case, tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "flan", "umt5", "bart"])
def test_a_head_that_was_trained_apart_from_the_embeddings_leaves_them_tied(case: str, tmp_path: Path) -> None:
    save_untied(tmp_path / "base", case, ())
    model, again = merged(tmp_path / "base", case, tmp_path / "out", modules_to_save=["lm_head"])
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
