"""Without an accelerator: a step of every method holds all it needs on the model's device, and waits for no value of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from dist_subspace import SubspaceConfig, attach, load_frozen, methods
from dist_subspace.storage import storages
from dist_subspace.subspace import named_trainables
from dist_subspace.training.data import GlobalBatch, MicroBatch
from dist_subspace.training.engine import Stepper
from dist_subspace.training.loss import forward, micro_batch_loss, summed_loss, whole_logits_because
from tests.devices.pretended import Pretended, WaitsForTheDevice, device
from tests.matrix import tiny
from tests.tiny_models import save_odd

WAITS = (DataDependentOutputException, DynamicOutputShapeException, WaitsForTheDevice)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2"):
        save_odd(folder, family)
    return folder


@pytest.fixture(scope="module")
def pretended() -> Iterator[Pretended]:
    """One for all tests: what the product computes once and keeps may be used again."""
    yield Pretended()


def adapted(models: Path, method: str, *, storage: str = "nf4", family: str = "llama", **config: Any) -> nn.Module:
    model = load_frozen(models / family, storage=storage, dtype="bfloat16" if storage != "fp16" else None, device="cpu")
    return attach(model, SubspaceConfig(method=method, rank=3, **config)).train()


def micro_batch(mode: FakeTensorMode, number: int = 0) -> MicroBatch:
    """As the loop gets it: on the CPU."""
    with mode:
        ids = torch.zeros(2, 7, dtype=torch.long)
    return MicroBatch(number, {"input_ids": ids, "attention_mask": ids + 1}, ids, 12, 2, 14)


def step(model: nn.Module, pretended: Pretended) -> None:
    """Forward, the loop's own loss, backward; then every gradient is there, on the device."""
    pretended.moved(model)
    batch = micro_batch(pretended.mode)
    with pretended.watched():
        summed_loss(forward(model, batch, device()), batch.labels).backward()
    lost = [name for name, p in named_trainables(model).items() if p.grad is None or p.grad.device != device()]
    assert lost == []


# FlexLoRA looks up its active triplets once, whenever its mask was written to: not a matter of every step.
CONSTRAINT = {"flexlora": "none"}


@pytest.mark.parametrize("method", methods())
def test_a_step_of_every_method_stays_on_the_device(method: str, models: Path, pretended: Pretended) -> None:
    step(adapted(models, method, constraint=CONSTRAINT.get(method)), pretended)


@pytest.mark.parametrize("method", ["lora", "ssb", "dora"])
@pytest.mark.parametrize("storage", [name for name in storages() if name not in ("nf4", "fp32")])
def test_a_step_on_every_storage_stays_on_the_device(
    storage: str, method: str, models: Path, pretended: Pretended
) -> None:
    step(adapted(models, method, storage=storage, family="gpt2"), pretended)


@pytest.mark.parametrize("constraint", ["mpc_o", "mpc_d", "mpc_n"])
def test_a_step_with_a_constraint_stays_on_the_device(constraint: str, models: Path, pretended: Pretended) -> None:
    step(adapted(models, "lora", constraint=constraint), pretended)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_recomputed_step_stays_on_the_device(method: str, models: Path, pretended: Pretended) -> None:
    model = adapted(models, method)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    step(model, pretended)


def test_a_step_with_new_tokens_stays_on_the_device(models: Path, pretended: Pretended) -> None:
    step(adapted(models, "ssl", new_tokens=(5, tiny.VOCABULARY)), pretended)


def proved(model: nn.Module) -> nn.Module:
    """The loss of it is made inside its head. Finding that out compares values, once, before there are steps."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert whole_logits_because(model, MicroBatch(0, {"input_ids": ids}, ids, 3, 1, 4), torch.device("cpu")) is None
    return model


@pytest.mark.parametrize(
    "config",
    [{}, {"new_tokens": (5, tiny.VOCABULARY)}, {"modules_to_save": ["lm_head"]}, {"method": "prompt", "rank": None}],
    ids=str,
)
def test_a_loss_that_is_made_inside_the_head_stays_on_the_device(
    config: dict[str, Any], models: Path, pretended: Pretended
) -> None:
    model = load_frozen(models / "llama", storage="nf4", dtype="bfloat16", device="cpu")
    attach(model, SubspaceConfig(**{"method": "lora", "rank": 3, **config})).train()
    pretended.moved(proved(model))
    batch = micro_batch(pretended.mode)
    with pretended.watched():
        micro_batch_loss(model, batch, device()).backward()
    assert all(p.grad is not None and p.grad.device == device() for p in named_trainables(model).values())


class PlainEngine:
    """As little of an engine as the loop asks for; it never waits."""

    loss_scale = 1.0

    def __init__(self, module: nn.Module) -> None:
        self.module, self.optimizer = module, torch.optim.SGD(module.parameters(), lr=0.1)
        self.backwards = self.steps = 0

    def __call__(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.backwards += 1

    def next_micro_batch(self) -> None:
        self.steps += 1


def test_the_loop_reads_the_losses_of_a_step_behind_its_last_round(models: Path, pretended: Pretended) -> None:
    model = pretended.moved(proved(adapted(models, "lora")))
    engine = PlainEngine(model)
    rounds = [micro_batch(pretended.mode, number) for number in range(3)]
    batch = GlobalBatch(0, [*rounds, None], rounds[0], 36, 6, 42, 0.0)
    with pretended.watched(), pytest.raises(WAITS):
        Stepper(engine, device(), 0, 1).accumulate(batch)
    assert (engine.backwards, engine.steps) == (4, 3)


# The pretended accelerator itself.


class Left(nn.Module):
    """A layer with a tensor that nothing moves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.left = torch.ones(3)

    def forward(self, x: Tensor, how: str) -> Tensor:
        y = x * self.weight
        match how:
            case "left":
                return y + self.left
            case "made":
                return y + torch.ones(3)
            case "item":
                return y * float(y.sum())
            case "bool":
                return y if (y > 0).any() else -y
            case "list":
                return y * y.tolist()[0]
            case "shape":
                return y[y.nonzero().flatten()]
            case "copy":
                return y * y.to("cpu").to(y.device)
        return y


@pytest.mark.parametrize("how", ["left", "made", "item", "bool", "list", "shape", "copy"])
def test_the_pretended_accelerator_refuses_what_a_real_one_would_wait_for_or_refuse(
    how: str, pretended: Pretended
) -> None:
    model = pretended.moved(Left())
    x = pretended.tensor(3)
    with pretended.watched():
        model(x, "nothing").sum().backward()
        with pytest.raises((*WAITS, RuntimeError, AssertionError)) as error:
            model(x, how).sum().backward()
    assert "device" in str(error.value) or isinstance(error.value, WAITS) or "FakeTensor" in str(error.value)
    assert model.weight.grad is not None and model.weight.grad.device == device()
