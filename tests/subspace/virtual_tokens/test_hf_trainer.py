"""The Hugging Face Trainer trains virtual and new tokens, under ZeRO-3 as without an engine: nobody keeps them whole there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, load_adapter, load_frozen, save_adapter
from tests.matrix import tiny
from tests.placement.hf_trainer import arguments, forget_earlier_trainers, rows, stock
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

CASES: dict[str, SubspaceConfig] = {
    "prefix": SubspaceConfig(method="prefix", options={"num_virtual_tokens": 3, "init": "normal"}),
    "projection": SubspaceConfig(method="prefix", options={"num_virtual_tokens": 3, "projection": True}),
    "prompt": SubspaceConfig(method="prompt", options={"num_virtual_tokens": 3}),
    "p-tuning": SubspaceConfig(method="p-tuning", options={"num_virtual_tokens": 3, "encoder": "lstm"}),
    "new tokens": SubspaceConfig(method="ssl", new_tokens=(5, tiny.VOCABULARY)),
}


def trained(folder: str, out: str, cases: list[str], stage: int | None, reentrant: bool) -> dict[str, dict[str, Any]]:
    return {case: _trained(case, folder, f"{out}/{case}-{stage}", stage, reentrant) for case in cases}


def _trained(case: str, folder: str, out: str, stage: int | None, reentrant: bool) -> dict[str, Any]:
    from transformers import Trainer

    forget_earlier_trainers()
    split = None if stage is None else stock(stage)
    model = attach(load_frozen(folder, storage="nf4", dtype="float32", deepspeed=split), CASES[case])
    args = arguments(out, stage, checkpointing=reentrant)
    args.max_steps, args.gradient_checkpointing_kwargs = 4, {"use_reentrant": reentrant}
    data = [{name: row.clamp(max=tiny.VOCABULARY) for name, row in sample.items()} for sample in rows()]
    for sample in data[::2]:
        sample["input_ids"][2] = tiny.VOCABULARY if case == "new tokens" else 4
    trainer = Trainer(model=model, args=args, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    save_adapter(model, f"{out}/adapter")
    ids = tiny.global_batch(4)
    engine = trainer.model_wrapped
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids, use_cache=False).logits
        forget_earlier_trainers()
        fresh = load_adapter(load_frozen(folder, storage="nf4", dtype="float32", device="cpu"), f"{out}/adapter").eval()
        again = fresh(input_ids=ids, use_cache=False).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "again": float((again - logits).abs().max())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("model"), "llama")


def test_losses_under_zero_3_are_those_without_an_engine(folder: str, tmp_path: Path) -> None:
    plain = run_on_ranks(1, trained, folder, str(tmp_path), [*CASES], None, False, timeout=480)[0]
    split = run_on_ranks(1, trained, folder, str(tmp_path), [*CASES], 3, True, timeout=480)[0]
    for case in CASES:
        assert split[case]["losses"] == pytest.approx(plain[case]["losses"], rel=2e-3), case
        assert split[case]["again"] < 1e-4 and plain[case]["again"] < 1e-4, case
        assert plain[case]["losses"][-1] < plain[case]["losses"][0], case


@pytest.mark.parametrize(("stage", "cases"), [(2, ["projection"]), (3, ["prefix", "new tokens"])])
def test_the_adapter_of_two_ranks_is_what_was_trained(
    folder: str, tmp_path: Path, stage: int, cases: list[str]
) -> None:
    first, second = run_on_ranks(2, trained, folder, str(tmp_path), cases, stage, True, timeout=480)
    for case in cases:
        assert first[case]["losses"] == second[case]["losses"], case
        assert first[case]["losses"][-1] < first[case]["losses"][0], case
        assert first[case]["again"] < 1e-4 and second[case]["again"] < 1e-4, case
