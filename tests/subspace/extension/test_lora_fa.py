"""LoRA-FA: golden numbers, what backward keeps, the corrected gradient, and A in PEFT's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dist_subspace as dsub
from dist_subspace import SubspaceConfig
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import adapter_tensors
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.subspace import SubspaceLinear, resolve
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.subspace.golden import BIAS, A, B, G, W, X, layer
from tests.subspace.peft_reference import peft_model
from tests.tiny_models import odd_model, save_odd


def golden(**config: Any) -> SubspaceLinear:
    module = layer("lora-fa", rank=2, alpha=4.0, **config)
    module.load_file_tensors({"lora_A.weight": A, "lora_B.weight": B})
    return module


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    torch.testing.assert_close(golden(transposed=transposed)(X), torch.tensor([[6.5, 8, 0]]))


def test_only_b_is_trained() -> None:
    module = golden()
    assert {name: p.numel() for name, p in module.trainables().items()} == {"lora_B": 6}
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.lora_B.grad, 2 * G.t() @ (X @ A.t()))
    torch.testing.assert_close(x.grad, G @ (W + 2 * B @ A))
    assert module.lora_A.matrix.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_r_numbers_a_token_and_not_x(dropout: float) -> None:
    tokens = 50
    module = golden(dropout=dropout).train()
    kept: list[tuple[int, ...]] = []
    x = torch.randn(tokens, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        module(x)
    assert sorted(kept) == [(2, tokens), (3, 2)]


def test_the_corrected_gradient_is_that_of_the_closest_step_in_w() -> None:
    """`g_B (A Aᵀ)⁻¹ / γ²` is the B-step whose `γ ∂B A` is the projection of W's gradient on A's rows."""
    module = golden(options={"corrected_gradient": True})
    module(X).backward(G)
    full = G.t() @ X
    projection = full @ A.t() @ torch.linalg.inv(A @ A.t()) @ A
    torch.testing.assert_close(2 * module.lora_B.grad @ A, projection)
    torch.testing.assert_close(golden(options={"corrected_gradient": True})(X), golden()(X))


def test_the_corrected_gradient_has_no_meaning_between_nonlinear_factors() -> None:
    with pytest.raises(UsageError, match="corrected_gradient is True, but under constraint mpc_n"):
        resolve(SubspaceConfig("lora-fa", constraint="mpc_n", options={"corrected_gradient": True}))


def test_peft_computes_the_same_from_the_file() -> None:
    module = golden(bias=True)
    torch.testing.assert_close(peft_model(module)(X), torch.tensor([[6.5, 8, 0]]) + BIAS)


@pytest.mark.parametrize("kind", ["mpc_o", "mpc_d"])
def test_a_penalty_on_a_frozen_factor_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="its A is frozen; accepted: none, mpc_n"):
        resolve(SubspaceConfig("lora-fa", constraint=kind))


def test_a_saved_adapter_brings_its_own_a(tmp_path: Path) -> None:
    """Also where it would be drawn otherwise: here another seed stands for another generator."""
    ids = tiny.global_batch(0)
    source = dsub.attach(odd_model("llama"), SubspaceConfig("lora-fa", rank=3, seed=1))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(source):
            parameter.normal_(std=0.1)
    dsub.save_adapter(source, tmp_path)
    config = tmp_path / "dist_subspace.json"
    config.write_text(config.read_text().replace('"seed": 1', '"seed": 2'))
    target = dsub.load_adapter(odd_model("llama"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(target(input_ids=ids).logits, source(input_ids=ids).logits)


def split_and_saved(folder: str) -> tuple[bool, bool, int]:
    """Under ZeRO-3: whether every A is split, whether a file's A is the drawn one, and how many there are."""
    model = dsub.load_frozen(folder, storage="bf16", deepspeed=tiny.ds_config(3, world_size=2), device="cpu")
    dsub.attach(model, SubspaceConfig("lora-fa", rank=3))
    factors = [m.lora_A.matrix for m in model.modules() if isinstance(m, SubspaceLinear)]
    before = [a.detach().clone() for a in factors]
    engine = tiny.make_engine(model, tiny.ds_config(3, trainable_numel=1000, world_size=2))
    split = all(is_partitioned(a) for a in factors)
    saved = [t for key, t in adapter_tensors(engine.module).items() if key.endswith("lora_A.weight")]
    engine.destroy()
    return split, all(torch.equal(a, b) for a, b in zip(before, saved, strict=True)), len(saved)


def test_a_is_split_over_the_ranks_and_whole_in_the_file(tmp_path: Path) -> None:
    folder = save_odd(tmp_path, "llama")
    for split, same, count in run_on_ranks(2, split_and_saved, folder):
        assert split and same and count == 14
