"""`attach` on models that transformers loaded itself, and the Hugging Face Trainer on what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.storage import FrozenLinear
from tests.tiny_models import VOCABULARY, logits, tiny_inputs, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
KINDS = ["plain", "load_frozen", *SETTINGS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(kind: str, folder: Path) -> Any:
    if kind == "load_frozen":
        return dsub.load_frozen(folder, storage="nf4", dtype="float32")
    arguments = {"dtype": torch.float32, "device_map": "cpu"} if kind in SETTINGS else {"dtype": torch.float32}
    if kind in SETTINGS:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(**SETTINGS[kind])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_model_that_bitsandbytes_quantised_is_taken_over(kind: str, folder: Path) -> None:
    ours = dsub.load_frozen(folder, storage=kind, dtype="float32", double_quant=kind == "fp4")
    model = dsub.attach(loaded(kind, folder), SubspaceConfig(rank=2))
    held = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    assert sum(m.storage == kind for m in held) == 14
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_the_adapter_and_nothing_else(kind: str, folder: Path, tmp_path: Path) -> None:
    model = dsub.attach(loaded(kind, folder), SubspaceConfig(rank=4))
    losses = train(model, tmp_path / "out")
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("method", "reentrant"),
    [
        pytest.param(method, number % 2 == odd, marks=[pytest.mark.slow] if odd else [])
        for number, method in enumerate(sorted(dsub.methods()))
        for odd in (0, 1)
    ],
)
def test_trainer_trains_every_method_with_checkpointing(
    method: str, reentrant: bool, folder: Path, tmp_path: Path
) -> None:
    rank = 4 if dsub.methods()[method].uses_rank else None
    model = dsub.attach(loaded("load_frozen", folder), SubspaceConfig(method=method, rank=rank))
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    losses = train(model, tmp_path / "out", **checkpointing)
    assert losses[-1] < losses[0]


class Watch(transformers.TrainerCallback):
    """What has changed in any step, and then `advance`, as its docstring tells a user of Trainer to call it (a schedule may
    set a whole layer's parameters back to zero in the last step)."""

    def __init__(self, model: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.changed: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.changed |= {name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])}
        dsub.advance(model, state.global_step, state.max_steps)


def train(model: Any, folder: Path, **arguments: Any) -> list[float]:
    """Three steps on four sequences that never change; checks what changed. Returns the losses before each step."""
    watch = Watch(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=generator)
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    samples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=samples, callbacks=[watch])
    trainer.train()
    trained = {id(p) for p in dsub.trainable_parameters(model)}
    assert watch.changed == {name for name, p in model.named_parameters() if id(p) in trained}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_default_method_is_lora() -> None:
    model = dsub.attach(tiny_model())
    assert dsub.summary(model).method == "lora"


def test_the_result_is_the_same_transformers_model() -> None:
    model = tiny_model("GPT2LMHeadModel")
    assert dsub.attach(model, SubspaceConfig(rank=2)) is model
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert model.get_input_embeddings() is model.transformer.wte


def test_no_weight_is_copied_by_attach() -> None:
    model = tiny_model()
    before = {p.data_ptr() for p in model.parameters()}
    dsub.attach(model, SubspaceConfig(rank=2))
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen == before


def test_methods_lists_every_method_by_its_name() -> None:
    listed = dsub.methods()
    assert {"lora", "ssl", "ssb"} <= set(listed)
    assert all(isinstance(info, dsub.MethodInfo) and info.name == name for name, info in listed.items())


def test_what_is_trained_follows_the_model_to_another_type() -> None:
    model: nn.Module = dsub.attach(tiny_model(), SubspaceConfig(rank=2)).to(torch.bfloat16)
    model.train()(**tiny_inputs(model, labels=True)).loss.backward()
    assert all(p.grad is not None for p in dsub.trainable_parameters(model))
