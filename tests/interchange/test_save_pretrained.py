"""`save_pretrained` of a model with a method writes its adapter, and a Trainer without the mixin never the packed base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

import dist_subspace as dsub
from dist_subspace.errors import UsageError
from tests.matrix import tiny
from tests.placement import hf_trainer as hf
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, save_odd, tiny_model

FILES = {"adapter_config.json", "adapter_model.safetensors", "dist_subspace.json"}


@pytest.mark.parametrize("method", ["lora", "pissa", "ssb"])
def test_save_pretrained_writes_what_load_adapter_reads(method: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    rank = 2 if dsub.methods()[method].uses_rank else None
    model = dsub.attach(
        dsub.load_frozen(tmp_path / "base", storage="nf4", dtype="float32"),
        dsub.SubspaceConfig(method=method, rank=rank),
    )
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    copy.deepcopy(model).save_pretrained(tmp_path / "copy", is_main_process=False)  # type: ignore[operator]
    assert {path.name for path in (tmp_path / "one").iterdir()} == FILES and not (tmp_path / "copy").exists()
    again = dsub.load_adapter(dsub.load_frozen(tmp_path / "base", storage="nf4", dtype="float32"), tmp_path / "one")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="save_pretrained has push_to_hub"):
        model.save_pretrained(tmp_path / "one", push_to_hub=True)  # type: ignore[operator]


def without_mixin(folder: str, out: str, stage: int | None, gather: bool) -> None:
    hf.forget_earlier_trainers()
    settings = None if stage is None else hf.stock(stage)
    if settings is not None and gather:
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    model = dsub.load_frozen(folder, storage="nf4", dtype="float32", deepspeed=settings)
    dsub.attach(model, dsub.SubspaceConfig(rank=2))
    args = hf.arguments(out, stage, False)
    args.max_steps, args.save_strategy, args.save_steps = 2, transformers.trainer_utils.SaveStrategy.STEPS, 2
    if settings is not None:
        args = transformers.TrainingArguments(
            **{"output_dir": out, "deepspeed": settings, "max_steps": 2, "save_strategy": "steps", "save_steps": 2},
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4},
        )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=hf.rows())  # type: ignore[arg-type]
    trainer.train()
    hf.forget_earlier_trainers()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "gather"), [(None, False), (2, False), (3, True), (3, False)])
def test_a_trainer_without_the_mixin_writes_the_adapter_as_the_model(
    stage: int | None, gather: bool, tmp_path: Path
) -> None:
    """Where ZeRO-3 does not gather, the engine's own files are all there is."""
    base = save_odd(tmp_path, "llama")
    run_on_ranks(2, without_mixin, base, str(tmp_path / "out"), stage, gather)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("model*.safetensors"))
    assert (checkpoint / "adapter_model.safetensors").exists() == (stage != 3 or gather)
    if stage != 3 or gather:
        model = dsub.load_adapter(dsub.load_frozen(base, storage="nf4", dtype="float32"), checkpoint)
        assert model(input_ids=tiny.global_batch(4)).logits.isfinite().all()
