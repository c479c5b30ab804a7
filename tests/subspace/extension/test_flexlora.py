"""FlexLoRA's layer: only active triplets take part, in the output, the penalty and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_subspace import SubspaceConfig, attach, load_adapter, save_adapter, trainable_parameters
from dist_subspace.errors import UsageError
from dist_subspace.subspace import resolve
from tests.subspace.golden import A, B, X, give, layer
from tests.tiny_models import logits, tiny_inputs, tiny_model

E = torch.tensor([0.5, -1])


def golden(**options):  # type: ignore[no-untyped-def]
    """Two active triplets with the fixture's values, of three."""
    module = layer("flexlora", rank=2, alpha=4.0, options=options)
    junk = torch.ones(1, 4)
    return give(
        module,
        lora_A=torch.cat([A, junk]),
        lora_B=torch.cat([B, junk[:, :3].t()], 1),
        lora_E=torch.tensor([0.5, -1, 7]),
    )


def test_the_output_is_the_golden_one_whatever_an_inactive_triplet_holds() -> None:
    module = golden()
    assert module.active.tolist() == [True, True, False]
    torch.testing.assert_close(module(X), torch.tensor([[3.5, 0, -1]]))


def test_an_inactive_triplet_gets_no_gradient() -> None:
    module = golden()
    module(X).sum().backward()
    assert not module.lora_A.grad[2].any() and not module.lora_B.grad[:, 2].any() and module.lora_E.grad[2] == 0
    assert module.lora_A.grad[:2].any() and module.lora_B.grad[:, :2].any()


def test_the_constraint_sees_the_active_triplets_alone_and_follows_the_mask() -> None:
    module = golden()
    a, b = module.constrained_factors()
    assert torch.equal(a, A) and torch.equal(b, B)
    module.active[0], module.active[2] = False, True
    a, b = module.constrained_factors()
    assert torch.equal(a[0], A[1]) and torch.equal(a[1], torch.ones(4)) and b.shape == (3, 2)


def test_the_defaults_are_16_triplets_of_which_8_are_active_and_a_scale_of_2() -> None:
    model = attach(tiny_model(), SubspaceConfig(method="flexlora"))
    parts = [m for m in model.modules() if hasattr(m, "active")]
    assert {len(part.lora_E) for part in parts} == {16} and {int(part.active.sum()) for part in parts} == {8}
    assert {part.scale for part in parts} == {2.0}
    settings = resolve(SubspaceConfig(method="flexlora")).settings
    assert settings.constraint is not None and (settings.constraint.kind, settings.constraint.power) == ("mpc_o", 1)
    assert settings.options["budget"] == 4


def test_a_maximum_below_the_rank_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"subspace\.options\.max_rank is 4; accepted: at least 8, which is subspace\.rank"
    ):
        resolve(SubspaceConfig(method="flexlora", options={"max_rank": 4}))


def test_the_mask_is_in_the_file_and_comes_back(tmp_path: Path) -> None:
    model = attach(tiny_model(), SubspaceConfig(method="flexlora", rank=3))
    for parameter in trainable_parameters(model):
        parameter.data.normal_(std=0.2)
    parts = [m for m in model.modules() if hasattr(m, "active")]
    parts[0].active[0], parts[1].active[5] = False, True
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))
    others = [m for m in again.modules() if hasattr(m, "active")]
    assert all(torch.equal(p.active, o.active) for p, o in zip(parts, others, strict=True))


def test_the_penalty_reaches_active_vectors_alone() -> None:
    model = attach(tiny_model(), SubspaceConfig(method="flexlora", rank=2)).train()
    model(**tiny_inputs(model, labels=True)).loss.backward()
    for part in (m for m in model.modules() if hasattr(m, "active")):
        assert part.lora_A.grad[:2].any() and not part.lora_A.grad[2:].any()
