"""A training step of every method never waits for the device, is repeatable where asked, and recomputes what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from dist_subspace import SubspaceConfig, attach, load_frozen, methods
from dist_subspace.subspace import named_trainables
from tests.gpu.device import DEVICE
from tests.matrix import tiny

STORAGES = ["nf4", "int8", "bf16"]


@pytest.fixture(autouse=True)
def transformers_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own look whether rows are packed waits for the device, once a forward; here is asked what ours does."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def adapted(models: Path, method: str, storage: str = "nf4", **config: Any) -> nn.Module:
    model = load_frozen(models / "llama", storage=storage, double_quant=storage == "nf4", dtype="bfloat16")
    attach(model, SubspaceConfig(method=method, rank=3, **config)).train()
    for number, parameter in enumerate(named_trainables(model).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.05 * noise.to(parameter.device, parameter.dtype))
    return model


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs, use_cache=False).logits.float().square().mean().backward()
    return {name: p.grad for name, p in named_trainables(model).items() if p.grad is not None}


def batch() -> dict[str, Tensor]:
    ids = tiny.global_batch(0).to(DEVICE)
    return {"input_ids": ids}


# A prefix looks where the samples of a row begin, where transformers makes no mask.
@pytest.mark.parametrize("method", [name for name in methods() if name != "prefix"])
def test_a_step_does_not_wait_for_the_device(method: str, models: Path) -> None:
    """torch raises at every call that would wait: `.item()`, a boolean of a tensor, a copy to the CPU."""
    model, inputs = adapted(models, method, dropout=0.1 if methods()[method].category == "extension" else 0.0), batch()
    gradients(model, inputs)  # what is computed once is computed
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found and all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("constraint", ["mpc_o", "mpc_d", "mpc_n"])
def test_a_step_with_a_constraint_does_not_wait_for_the_device(storage: str, constraint: str, models: Path) -> None:
    model, inputs = adapted(models, "lora", storage, constraint=constraint), batch()
    gradients(model, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", methods())
def test_every_method_is_repeatable_under_deterministic_algorithms(method: str, models: Path) -> None:
    model, inputs = adapted(models, method), batch()
    torch.use_deterministic_algorithms(True)
    first, second = gradients(model, inputs), gradients(model, inputs)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "ssb", "houlsby", "prefix"])
def test_gradients_are_the_same_under_gradient_checkpointing(method: str, reentrant: bool, models: Path) -> None:
    options = {} if method in ("ssb", "prefix") else {"dropout": 0.3}
    model, inputs = adapted(models, method, **options), batch()
    torch.manual_seed(1)
    plain = {name: g.clone() for name, g in gradients(model, inputs).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    torch.manual_seed(1)
    again = gradients(model, inputs)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=2e-2, atol=2e-3 * float(gradient.abs().max()), msg=name)


def test_the_rounds_of_a_step_do_not_wait_for_one_another(models: Path) -> None:
    """The loop reads the step's loss once, behind its last backward; torch raises where somebody waits before."""
    from dist_subspace.placement.deepspeed.engine import DeepSpeedEngine, initialize
    from dist_subspace.training.data import GlobalBatch, MicroBatch
    from dist_subspace.training.engine import Stepper

    model = adapted(models, "lora")
    config = tiny.ds_config(0) | {"gradient_accumulation_steps": 4, "train_batch_size": 16}
    engine = DeepSpeedEngine(initialize(model, tiny.adam(named_trainables(model).values(), 1e-3), config))
    ids = tiny.global_batch(0)
    count = ids.numel()
    rounds = [MicroBatch(number, {"input_ids": ids}, ids, count, len(ids), count) for number in range(4)]
    whole = GlobalBatch(0, list(rounds), rounds[0], 4 * count, 16, 4 * count, 0.0)
    stepper = Stepper(engine, DEVICE, 0, 1)
    stepper.accumulate(whole)
    engine.step(True)

    def between() -> bool:
        """Asked before rounds 1, 2 and 3: what lies between the first and the last question must not wait."""
        asked.append(True)
        torch.cuda.set_sync_debug_mode("error" if len(asked) < 3 else "default")
        return False

    asked: list[bool] = []
    stepper.accumulate(whole, between)
    assert len(asked) == 3
