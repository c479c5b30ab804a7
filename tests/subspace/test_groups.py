"""Groups of parameters for an optimizer."""

from __future__ import annotations

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, methods, parameter_groups, trainable_parameters
from dist_subspace.errors import UsageError
from tests.tiny_models import tiny_model


def groups(weight_decay: float = 0.0, **config: object) -> tuple[list, list]:
    model = attach(tiny_model(), SubspaceConfig(**{"rank": 2, **config}))  # type: ignore[arg-type]
    return parameter_groups(model, 1e-3, weight_decay), trainable_parameters(model)


@pytest.mark.parametrize("method", sorted(methods()))
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_group_is_empty_and_every_parameter_is_in_one(method: str, weight_decay: float) -> None:
    made, trained = groups(weight_decay, method=method)
    assert made and all(group["params"] for group in made)
    assert sorted(id(p) for group in made for p in group["params"]) == sorted(map(id, trained))
    optimizer = torch.optim.AdamW(made)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0] * len(made))
    optimizer.step()
    schedule.step()


def test_vectors_are_not_decayed() -> None:
    for method, dimensions in (("lora", 2), ("ssl", 1)):
        made, _ = groups(0.1, method=method)
        (group,) = made
        assert group["weight_decay"] == (0.1 if dimensions == 2 else 0.0)
    made, _ = groups(0.1, modules_to_save=["norm"])
    assert {(group["weight_decay"], group["params"][0].dim()) for group in made} == {(0.1, 2), (0.0, 1)}


def test_the_learning_rate_of_b_is_multiplied_by_the_ratio() -> None:
    made, _ = groups(0.1, options={"lr_ratio": 16.0})
    assert sorted((group["lr"], len(group["params"])) for group in made) == [(1e-3, 14), (pytest.approx(16e-3), 14)]
    fast = max(made, key=lambda group: group["lr"])
    assert all(p.shape[1] == 2 for p in fast["params"])


def test_a_model_without_a_method_is_refused() -> None:
    with pytest.raises(UsageError, match="call attach first"):
        parameter_groups(tiny_model(), 1e-3)
