"""What leaves the device: adapters, merged models, PEFT's folders, generated text; and training by transformers and by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig, attach, load_adapter, load_frozen, save_adapter
from tests.gpu.device import DEVICE
from tests.interchange.trained import move
from tests.matrix import tiny

METHODS = ["lora", "dora", "ssb", "pissa", "svdiff"]


def adapted(models: Path, method: str, storage: str = "nf4") -> nn.Module:
    model = load_frozen(models / "llama", storage=storage, dtype="float32")
    return move(attach(model, SubspaceConfig(method=method, rank=3)))


def logits(model: nn.Module, device: Any = DEVICE) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny.global_batch(9).to(device), use_cache=False).logits.float().cpu()


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_and_a_merged_model_say_on_the_cpu_what_the_model_says_here(
    method: str, storage: str, models: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(models, method, storage)
    here = logits(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_frozen(models / "llama", storage=storage, dtype="float32", device="cpu")
    # The CPU packs the base again, and a value between two codes may fall to either.
    near = {"rtol": 1e-3, "atol": 1e-3 if storage == "fp32" else 2e-2}
    torch.testing.assert_close(logits(load_adapter(fresh, tmp_path / "adapter"), "cpu"), here, **near)
    dsub.merge(model, tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, "cpu"), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_the_export_and_trains_to_the_same_losses_on_bitsandbytes_layers(
    method: str, models: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    ours = adapted(models, method)
    report = dsub.export_peft(ours, tmp_path / "peft")
    assert report is not None
    theirs = PeftModel.from_pretrained(quantised(models), tmp_path / "peft", is_trainable=True)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=2e-3, atol=2e-3)
    curves = [losses(model) for model in (ours, theirs)]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3) and curves[0][-1] < curves[0][0]


def quantised(models: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        models / "llama", dtype=torch.float32, quantization_config=four_bit, device_map={"": DEVICE}
    )


def losses(model: nn.Module) -> list[float]:
    """A loop of plain torch."""
    optimizer = tiny.adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    found = []
    for step in range(4):
        ids = tiny.global_batch(step % 2).to(DEVICE)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("stage", [None, 2, 3])
@pytest.mark.parametrize("loader", ["load_frozen", "bitsandbytes"])
def test_the_hugging_face_trainer_trains_here_as_a_plain_loop_does(
    loader: str, stage: int | None, models: Path, tmp_path: Path
) -> None:
    if loader == "bitsandbytes" and stage is not None:
        pytest.skip("transformers does not split quantised layers; load_frozen does")
    split = None if stage is None else stock(stage)
    args = arguments(tmp_path, split)
    model: Any = (
        quantised(models)
        if loader == "bitsandbytes"
        else load_frozen(models / "llama", storage="nf4", dtype="float32", deepspeed=split)
    )
    attach(model, SubspaceConfig(method="lora", rank=3, seed=4))
    from transformers import Trainer

    rows = [{"input_ids": row, "labels": row} for step in range(4) for row in tiny.global_batch(step % 2)]
    trainer = Trainer(model=model, args=args, train_dataset=InOrder(rows))
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plain = attach(
        load_frozen(models / "llama", storage="nf4", dtype="float32"), SubspaceConfig(method="lora", rank=3, seed=4)
    )
    assert curve == pytest.approx(losses(plain), rel=2e-3)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_adapter(load_frozen(models / "llama", storage="nf4", dtype="float32"), tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(plain), rtol=5e-3, atol=5e-3)


class InOrder(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows that nobody shuffles."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def stock(stage: int) -> dict[str, Any]:
    names = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    thresholds = {f"stage3_{name}": 0 for name in names} if stage == 3 else {}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **thresholds},
    }


def arguments(folder: Path, split: dict[str, Any] | None) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=split,
        max_steps=4,
        per_device_train_batch_size=tiny.BATCH,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        weight_decay=0.01,  # of `tiny.adam`, which is torch's default
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_generated_text_is_that_of_the_cpu(method: str, models: Path, tmp_path: Path) -> None:
    model = adapted(models, method)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_adapter(
        load_frozen(models / "llama", storage="nf4", dtype="float32", device="cpu"), tmp_path / "adapter"
    )
    ids = tiny.global_batch(9)[:, :4]
    options: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    here, there = (m.eval().generate(ids.to(d), **options) for m, d in ((model, DEVICE), (fresh, "cpu")))  # type: ignore[operator]
    assert here.cpu().tolist() == there.tolist()
