"""A trainer with the mixin trains what TRL's trains with PEFT's LoRA; any method trains in it; it writes and reads adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.subspace import attached
from tests.trainers import bench

LN2 = 0.6931472
QUICK, OTHERS = ("SFTTrainer", "DPOTrainer"), ("KTOTrainer", "RewardTrainer")
VIRTUAL = ("prefix", "prompt", "p-tuning")  # which begin elsewhere than the base


@pytest.mark.parametrize("trainer", [*QUICK, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_losses_are_those_of_pefts_lora_in_trls_trainer(trainer: str, tmp_path: Path) -> None:
    base = bench.save_base(tmp_path / "base", trainer)
    ours = bench.made(trainer, base, tmp_path / "ours")
    theirs = bench.theirs(trainer, base, tmp_path / "theirs", ours.model)
    ours.train()
    theirs.train()
    assert len(bench.losses(ours)) == 4
    assert bench.losses(ours) == pytest.approx(bench.losses(theirs), rel=1e-5)
    if trainer == "DPOTrainer":
        assert bench.losses(ours)[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8", "bf16"])
@pytest.mark.parametrize("method", sorted(dsub.methods()))
def test_every_method_and_storage_begins_preferences_at_their_reference(
    method: str, storage: str, tmp_path: Path
) -> None:
    """And what is trained lowers the loss of pairs that are seen again."""
    base = bench.save_base(tmp_path / "base")
    rank = 4 if dsub.methods()[method].uses_rank else None
    rate = 5e-2 if method in ("ssb", "ssl", "ia3", "bitfit", "sam-parser", "svdiff") else 2e-2
    steps: dict[str, Any] = {"max_steps": 8, "lr_scheduler_type": "constant", "learning_rate": rate}
    pairs = bench.samples("DPOTrainer", 4)
    trainer = bench.made(
        "DPOTrainer",
        base,
        tmp_path / "out",
        method=method,
        rank=rank,
        storage=storage,
        keywords={"train_dataset": pairs},
        **steps,
    )
    trainer.train()
    losses = bench.losses(trainer)
    if method not in VIRTUAL:
        assert losses[0] == pytest.approx(LN2, abs=0.02 if storage == "bf16" else 2e-4)
    assert losses[-1] < losses[0] - 0.01


def test_a_method_beyond_lora_lowers_the_loss_of_preferences(base: Path, tmp_path: Path) -> None:
    pairs = {"train_dataset": bench.samples("DPOTrainer", 4)}
    manner: dict[str, Any] = {"learning_rate": 5e-2, "lr_scheduler_type": "constant", "max_steps": 3}
    trainer = bench.made("DPOTrainer", base, tmp_path, method="ssb", rank=None, storage="nf4", keywords=pairs, **manner)
    trainer.train()
    losses = bench.losses(trainer)
    assert losses[0] == pytest.approx(LN2, abs=1e-4) and losses[-1] < losses[0] - 0.01


def test_a_resumed_training_goes_on_to_the_bit_and_says_nothing_of_missing_keys(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manner: dict[str, Any] = {"method": "adalora", "storage": "nf4", "gradient_accumulation_steps": 2, "max_steps": 4}
    manner |= {"options": {"warmup_steps": 1, "final_steps": 1, "interval": 1}, "per_device_train_batch_size": 2}
    whole = bench.made("SFTTrainer", base, tmp_path / "whole", **manner)
    whole.train()
    manner |= {"save_strategy": "steps", "save_steps": 2}
    bench.made("SFTTrainer", base, tmp_path / "half", **manner).train()
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    caplog.clear()
    resumed = bench.made("SFTTrainer", base, tmp_path / "half", **manner)
    resumed.train(resume_from_checkpoint=True)
    assert "missing" not in caplog.text and "unexpected" not in caplog.text
    assert bench.losses(resumed) == bench.losses(whole)
    expected, found = bench.values(whole.model), bench.values(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_save_model_writes_the_adapter_that_load_adapter_reads(base: Path, tmp_path: Path) -> None:
    trainer = bench.made("SFTTrainer", base, tmp_path / "out", storage="nf4", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files == {
        *("adapter_config.json", "adapter_model.safetensors", "dist_subspace.json", "training_args.bin"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    trained = sum(4 * p.numel() for p in dsub.trainable_parameters(trainer.model))
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < trained + 4000
    again = dsub.load_adapter(dsub.load_frozen(base, storage="nf4", dtype="float32"), tmp_path / "saved")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_the_optimizer_has_the_methods_groups(base: Path, tmp_path: Path) -> None:
    trainer = bench.made(
        "SFTTrainer", base, tmp_path, options={"lr_ratio": 16.0}, weight_decay=0.1, optim="adamw_torch"
    )
    groups = trainer.create_optimizer().param_groups
    assert sorted(group["lr"] for group in groups) == pytest.approx([1e-2, 16e-2])
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name.rpartition(".")[2]: held[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert rates == pytest.approx({"lora_A": 1e-2, "lora_B": 16e-2})
    flat = bench.made("SFTTrainer", base, tmp_path, method="ia3", rank=None, weight_decay=0.1)
    assert [group["weight_decay"] for group in flat.create_optimizer().param_groups] == [0.0]


def test_the_best_checkpoint_is_loaded_at_the_end_and_a_training_stops_early(base: Path, tmp_path: Path) -> None:
    """With a rate at which the evaluation grows worse from some step on."""
    stopping = [transformers.EarlyStoppingCallback(early_stopping_patience=1)]
    trainer = bench.made(
        "SFTTrainer",
        base,
        tmp_path,
        keywords={"callbacks": stopping, "eval_dataset": bench.samples("SFTTrainer", 8, seed=4)},
        **{"max_steps": 6, "learning_rate": 0.3, "lr_scheduler_type": "constant", "save_total_limit": 3},
        **{
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "save_only_model": True,
        },
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
    )
    trainer.train()
    assert trainer.state.global_step < 6
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert trainer.state.best_metric == min(losses.values()) < losses[trainer.state.global_step]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("trainer", ["SFTTrainer", pytest.param("DPOTrainer", marks=pytest.mark.slow)])
def test_gradient_accumulation_counts_a_penalty_once_a_step(trainer: str, base: Path, tmp_path: Path) -> None:
    """The penalty's gradient does not depend on the data: of one micro-batch or of four it is the same."""
    found = []
    for accumulated in (1, 4):
        made = bench.made(
            trainer,
            base,
            tmp_path,
            attach={"constraint": "mpc_o", "constraint_weight": 1e3},
            **{"max_steps": 1, "per_device_train_batch_size": 4 // accumulated, "optim": "sgd", "max_grad_norm": 0.0},
            gradient_accumulation_steps=accumulated,
        )
        before = bench.values(made.model)
        made.train()
        found.append({n: before[n] - value for n, value in bench.values(made.model).items()})
    assert max(value.abs().max() for value in found[0].values()) > 1e-3
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-2, atol=2e-4)


def test_a_plain_trainer_of_hugging_face_goes_with_it_too(tmp_path: Path, base: Path) -> None:
    class Mine(dsub.TrainerMixin, transformers.Trainer):
        pass

    model = dsub.attach(dsub.load_frozen(base, storage="int8", dtype="float32"), dsub.SubspaceConfig(rank=2))
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 83).view(8, 10)]
    settings = {key: value for key, value in bench.COMMON.items() if key != "save_strategy"}
    args = transformers.TrainingArguments(str(tmp_path), save_strategy="steps", save_steps=2, **settings)
    trainer = Mine(model, args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("model*.safetensors")) and attached(model).info.name == "lora"
