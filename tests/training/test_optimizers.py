"""Every optimizer that has a name here is the one that transformers' Trainer makes for that name."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from dist_subspace.config import names
from dist_subspace.errors import UsageError
from dist_subspace.training.optimizers import ON_ANY_DEVICE, ON_CUDA, AdamSettings, check_optimizer, make_optimizer

SETTINGS = AdamSettings(learning_rate=0.02, beta1=0.8, beta2=0.95, epsilon=1e-5)
DECAY = 0.1


def parameters() -> list[nn.Parameter]:
    """One is large enough for a state of 8 bits, and a vector is beside it."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((64, 96), (96,))]


def groups(trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": trained[:1], "weight_decay": DECAY, "lr": SETTINGS.learning_rate},
        {"params": trained[1:], "weight_decay": 0.0, "lr": SETTINGS.learning_rate / 2},
    ]


def of_transformers(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    arguments = TrainingArguments(
        output_dir="unused",
        optim=name,
        learning_rate=SETTINGS.learning_rate,
        adam_beta1=SETTINGS.beta1,
        adam_beta2=SETTINGS.beta2,
        adam_epsilon=SETTINGS.epsilon,
        report_to=[],
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(groups(trained), **options)  # type: ignore[no-any-return]


def described(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """The kind of update, the bits of its state, whether that is paged, and what torch's own groups say."""
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    name = getattr(optimizer, "optimizer_name", type(optimizer).__name__)
    return name, bits, getattr(optimizer, "is_paged", None), optimizer.param_groups[0].get("fused")


def four_steps(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", get_args(names.Optimizer))
def test_a_name_gives_the_steps_of_transformers_own_optimizer(name: str) -> None:
    ours, theirs = parameters(), parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes says that a CPU has no pages
        made = make_optimizer(name, groups(ours), SETTINGS)
        four_steps(made, ours)
        expected = of_transformers(name, theirs)
        four_steps(expected, theirs)
    assert described(made) == described(expected)
    for one, other, start in zip(ours, theirs, parameters(), strict=True):
        assert not torch.equal(other, start)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_every_name_of_the_configuration_is_made_and_those_of_gpus_are_refused_elsewhere() -> None:
    assert sorted([*ON_ANY_DEVICE, *ON_CUDA]) == sorted(get_args(names.Optimizer))
    for name in ON_ANY_DEVICE:
        check_optimizer(name, torch.device("cpu"))
    for name in ON_CUDA:
        check_optimizer(name, torch.device("cuda"))
        with pytest.raises(UsageError, match=rf"training\.optim is '{name}', which bitsandbytes has on GPUs only"):
            check_optimizer(name, torch.device("cpu"))
