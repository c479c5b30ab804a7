"""The Hugging Face Trainer with a DeepSpeed configuration, on two ranks, whoever loaded the model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_subspace import SubspaceConfig, attach, load_adapter, load_frozen, save_adapter
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import gathered, resident_bytes
from tests.matrix import tiny
from tests.placement.hf_trainer import arguments, forget_earlier_trainers, rows, stock
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

# Who loads the model; `early`: TrainingArguments exist before, so that transformers itself splits its models at ZeRO-3.
LOADERS = (
    "load_frozen",
    "load_frozen early",
    "transformers",
    "transformers early",
    "bitsandbytes",
    "bitsandbytes early",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_odd(folder, family) for family in ("llama", "gpt2")}


def load(loader: str, model: str, stage: int | None) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if loader.startswith("load_frozen"):
        return load_frozen(model, storage="nf4", dtype="float32", deepspeed=None if stage is None else stock(stage))
    quantised = {}
    if loader.startswith("bitsandbytes"):
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
        quantised = {"quantization_config": four_bit}
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **quantised)


def trained(model_folder: str, out: str, loader: str, stage: int | None, checkpointing: bool) -> dict[str, Any]:
    """Train, save, read back on a model of its own; losses and logits of the engine and of the model read back."""
    from transformers import Trainer

    forget_earlier_trainers()
    args = arguments(out, stage, checkpointing) if "early" in loader else None
    model = attach(load(loader, model_folder, stage), SubspaceConfig(method="lora", rank=3))
    args = args or arguments(out, stage, checkpointing)
    trainer = Trainer(model=model, args=args, train_dataset=rows())  # type: ignore[arg-type]
    trainer.train()
    engine = trainer.model_wrapped
    frozen = tiny.frozen_parameters(model)
    facts: dict[str, Any] = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "split": sum(is_partitioned(p) for p in frozen.values()),
        "frozen": len(frozen),
        "resident": resident_bytes(frozen.values()),
        "shards": tiny.shard_bytes(frozen, world().size),
    }
    save_adapter(model, f"{out}/adapter")
    ids = tiny.global_batch(4)
    engine.eval()
    with torch.no_grad():
        facts["logits"] = engine(input_ids=ids, use_cache=False).logits
    if loader != "load_frozen early":  # there the second load comes while the Trainer and its settings live
        forget_earlier_trainers()
    plain = load(loader, model_folder, None)
    with torch.no_grad():
        facts["base"] = plain.eval()(input_ids=ids, use_cache=False).logits if "bits" not in loader else None
        fresh = load_adapter(plain, f"{out}/adapter").eval()
        facts["again"] = fresh(input_ids=ids, use_cache=False).logits
    return facts


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_trainer_with_deepspeed_trains_and_the_adapter_is_what_was_trained(
    models: dict[str, str], tmp_path: Path, loader: str, stage: int
) -> None:
    check(run_on_ranks(2, trained, models["llama"], str(tmp_path), loader, stage, False), stage)


@pytest.mark.parametrize("loader", ["transformers early", "load_frozen"])
def test_trainer_with_zero3_and_gradient_checkpointing_trains_conv1d_layers(
    models: dict[str, str], tmp_path: Path, loader: str
) -> None:
    check(run_on_ranks(2, trained, models["gpt2"], str(tmp_path), loader, 3, True), 3)


def inside(model_folder: str, whose: str) -> tuple[bool, bool, torch.Tensor, torch.Tensor]:
    """Two loads while transformers or the caller splits every new module."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    forget_earlier_trainers()
    settings = stock(3) | {"train_micro_batch_size_per_gpu": 1, "train_batch_size": world().size}
    settings["gradient_accumulation_steps"] = 1
    alive = HfDeepSpeedConfig(settings) if whose == "HfDeepSpeedConfig" else None
    context = nullcontext() if alive else deepspeed.zero.Init(config_dict_or_path=settings)
    with context:
        whole = load_frozen(model_folder, storage="nf4", dtype="float32")
        split = load_frozen(model_folder, storage="nf4", dtype="float32", deepspeed=settings)
        mine = nn.Linear(4, 4)
    ids = tiny.global_batch(4)
    with torch.no_grad(), gathered(list(split.parameters())):
        logits = split(input_ids=ids, use_cache=False).logits
        expected = whole(input_ids=ids, use_cache=False).logits
    forget_earlier_trainers()
    ours = not any(map(is_partitioned, whole.parameters())) and all(map(is_partitioned, split.parameters()))
    return ours, is_partitioned(mine.weight), logits, expected


@pytest.mark.parametrize("whose", ["HfDeepSpeedConfig", "zero.Init"])
def test_loading_while_others_split_every_new_module(models: dict[str, str], whose: str) -> None:
    for ours, mine, logits, expected in run_on_ranks(2, inside, models["llama"], whose):
        assert ours
        assert mine == (whose == "zero.Init"), "the caller's own modules are split as before"
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loader", ["transformers", "bitsandbytes"])
def test_trainer_without_deepspeed_gives_the_same_losses_on_one_rank(
    models: dict[str, str], tmp_path: Path, loader: str
) -> None:
    plain = run_on_ranks(1, trained, models["llama"], str(tmp_path), loader, None, False)[0]
    split = run_on_ranks(1, trained, models["llama"], str(tmp_path), loader, 3, False)[0]
    assert split["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def check(ranks: list[dict[str, Any]], stage: int) -> None:
    for facts in ranks:
        assert facts["losses"][-1] < 0.9 * facts["losses"][0]
        torch.testing.assert_close(facts["again"], facts["logits"], rtol=1e-4, atol=1e-4)
        if facts["base"] is not None:
            assert (facts["base"] - facts["logits"]).abs().max() > 0.1
        if stage == 3:
            assert facts["split"] == facts["frozen"]
            assert facts["resident"] == facts["shards"]
