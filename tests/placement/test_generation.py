"""Ranks that share the weights write texts of different lengths, and each writes what it would write alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.generation import keep_ranks_together
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

PROMPTS = torch.tensor([[3, 4], [5, 6], [7, 8]])


def model_of(folder: str, how: str, deepspeed: dict[str, Any] | None) -> Any:
    """`loaded` frozen, `attached` to one that was, or to one of `transformers`, which is split when the engine is made."""
    if how == "transformers":
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = load_frozen(
            folder, storage="int8" if how == "attached" else "fp32", dtype="float32", deepspeed=deepspeed
        )
    if how != "loaded":
        attach(model, SubspaceConfig(rank=2, target_modules=["q_proj"]))
    return model.eval()


def write(model: Any, rank: int, **options: Any) -> list[int]:
    """A greedy text of its own length for each rank."""
    return model.generate(  # type: ignore[no-any-return]
        input_ids=PROMPTS[rank : rank + 1], do_sample=False, max_new_tokens=(12, 3, 7)[rank], pad_token_id=0, **options
    )[0].tolist()


def texts(folder: str, how: str) -> dict[str, Any]:
    """Collective: before and after there is an engine, left open, and with a False as transformers' Seq2SeqTrainer passes it."""
    ensure_process_group()
    model = model_of(folder, how, tiny.ds_config(3, world_size=1))
    seen: dict[str, Any] = {}
    if how != "transformers":
        with pytest.raises(UsageError, match=r"split over the ranks.*after deepspeed\.initialize"):
            write(model, world().rank)
    if how == "loaded":
        attach(model, SubspaceConfig(rank=2, target_modules=["q_proj"]))
    sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": world().size}
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=100) | sizes)
    engine.eval()
    for name, options in (("open", {}), ("true", {"synced_gpus": True}), ("false", {"synced_gpus": False})):
        seen[name] = write(engine.module, world().rank, **options)
    engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("ranks", "how"),
    [(2, "loaded"), (2, "attached"), (2, "transformers"), pytest.param(3, "attached", marks=pytest.mark.slow)],
)
def test_texts_are_those_of_one_process(ranks: int, how: str, tmp_path: Path) -> None:
    folder = save_odd(tmp_path, "llama")
    alone = model_of(folder, how, None)
    expected = [write(alone, rank) for rank in range(ranks)]
    assert len({len(text) for text in expected}) == ranks
    for rank, seen in enumerate(run_on_ranks(ranks, texts, folder, how)):
        assert set(seen) == {"open", "true", "false"} and all(text == expected[rank] for text in seen.values())


def test_a_copy_of_a_model_generates_with_its_own_weights(tmp_path: Path) -> None:
    model = model_of(save_odd(tmp_path, "llama"), "attached", None)
    keep_ranks_together(model)
    other, before = copy.deepcopy(model), write(model, 0)
    with torch.no_grad():
        other.lm_head.weight.copy_(torch.randn_like(other.lm_head.weight))
    assert write(model, 0) == before != write(other, 0)


def full_and_short(folder: str) -> tuple[list[int], list[int] | str]:
    """Collective: rank 0's row ends with the model's table of positions, long before that of rank 1; then rank 0 is refused."""
    ensure_process_group()
    config = tiny.ds_config(3, world_size=1)
    model = model_of(folder, "loaded", config)
    attach(model, SubspaceConfig(rank=2, target_modules=["c_attn"]))
    sizes = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": world().size}
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=100) | sizes)
    engine.eval()
    rows = (torch.full((1, 30), 3), torch.tensor([[4, 5]]))[world().rank]
    made = engine.module.generate(input_ids=rows, do_sample=False, max_new_tokens=(2, 25)[world().rank], pad_token_id=0)
    refused: list[int] | str
    try:
        bad = {"temperature": -1.0, "do_sample": True} if world().is_main else {"do_sample": False}
        refused = engine.module.generate(input_ids=rows[:, :2], max_new_tokens=5, pad_token_id=0, **bad)[0].tolist()
    except ValueError as error:
        refused = str(error)
    engine.destroy()
    return made[0].tolist(), refused


def test_a_rank_whose_row_is_full_keeps_the_others_company(tmp_path: Path) -> None:
    """So does one whose own call is refused, and the others have their texts."""
    folder = save_odd(tmp_path, "gpt2")
    model = model_of(folder, "loaded", None)
    full = model.generate(torch.full((1, 30), 3), do_sample=False, max_new_tokens=2, pad_token_id=0)[0].tolist()
    short = model.generate(torch.tensor([[4, 5]]), do_sample=False, max_new_tokens=25, pad_token_id=0)[0].tolist()
    (first, refused), (second, text) = run_on_ranks(2, full_and_short, folder, timeout=60)
    assert (first, second) == (full, short) and len(short) > 8
    assert "temperature" in refused and text == short[:7]
