"""LoftQ: LoRA that starts at a fit of what rounding lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, SubspaceLinear, Weight, resolve
from tests.subspace.golden import LOFTQ, TOY, moved, opened, settled, toy_quantiser

MATRIX = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


def unsettled(method: str = "lora", storage: str = "nf4", rounds: int = 1, **config: Any) -> SubspaceLinear:
    options = {"init": "loftq", "iterations": rounds}
    resolved = resolve(SubspaceConfig(method=method, **{"rank": 3, "options": options, **config}))
    return resolved.method.build(pack(MATRIX, storage), resolved.settings, torch.Generator().manual_seed(0), None)


def fitted(**config: Any) -> SubspaceLinear:
    return settled(unsettled(**config), MATRIX)


def product(part: SubspaceLinear) -> Tensor:
    return part.scale * part.lora_B.detach() @ part.lora_A.detach()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_the_start_errs_as_the_best_golden_round_whatever_the_scale(rank: int, rounds: int, alpha: float) -> None:
    options = {"init": "loftq", "iterations": rounds}
    resolved = resolve(SubspaceConfig(method="lora", rank=rank, alpha=alpha, options=options))
    part = resolved.method.build(pack(TOY.float(), "nf4"), resolved.settings, torch.Generator(), None)
    weight = Weight(toy_quantiser(TOY).float(), lambda: TOY.float(), toy_quantiser, torch.Generator())
    factors = part.decompose(weight)
    base = toy_quantiser(part.rebased(factors, weight)) if part.rebases else weight.matrix
    part.set_factors(factors)
    error = float((base + product(part) - TOY).norm())
    torch.testing.assert_close(error, min(LOFTQ[rank][:rounds]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_start_is_nearer_to_the_original_than_the_rounded_base(method: str, storage: str) -> None:
    part = fitted(method=method, storage=storage)
    x = torch.randn(20, 8)
    wanted = x @ MATRIX.t()
    with torch.no_grad():
        assert (part(x) - wanted).norm() < 0.9 * (part.base(x) - wanted).norm()
    part.enabled = False
    assert torch.equal(part(x), part.base(x))


def test_peft_is_promised_it_only_where_the_base_is_the_one_that_peft_would_make() -> None:
    once, often = fitted(rounds=1), fitted(rounds=4)
    assert once.peft.agrees(once) and not often.peft.agrees(often)


def test_either_factor_gets_the_root() -> None:
    part = fitted()
    torch.testing.assert_close(part.lora_A.norm(dim=1), part.lora_B.norm(dim=0))


def test_more_rounds_change_the_base_and_a_disabled_layer_says_what_was_before() -> None:
    part = moved(fitted(rounds=4))
    held = part.base.dense()
    assert part.rebases and not torch.equal(held, pack(MATRIX, "nf4").dense())
    part.enabled = False
    x = torch.randn(20, 8)
    expected = x @ (held + part.scale * part.loftq_B @ part.loftq_A).t()
    torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 4])
def test_onto_the_original_the_change_since_the_start_is_merged(rounds: int) -> None:
    part = fitted(rounds=rounds)
    torch.testing.assert_close(part.merged_onto_original(MATRIX), MATRIX)
    start = product(part)
    moved(part)
    torch.testing.assert_close(part.merged_onto_original(MATRIX), MATRIX + product(part) - start)
    base = part.base.dense()
    torch.testing.assert_close(part.merged(base), base + product(part))
    a, b = part.low_rank_form()
    relative_to = MATRIX if rounds > 1 else base  # anyone can make Q(W), but not the base of later rounds
    wanted = part.merged_onto_original(MATRIX) if rounds > 1 else part.merged(base)
    torch.testing.assert_close(relative_to + b @ a, wanted.detach())


@pytest.mark.parametrize("rounds", [1, 4])
def test_what_a_file_keeps_sets_a_fresh_layer_up_again(rounds: int) -> None:
    part = moved(fitted(rounds=rounds))
    kept, fresh = part.factor_tensors(), unsettled(rounds=rounds)
    assert set(kept) == set(fresh.kept_factors) and len(kept) == (2 if rounds == 1 else 4)
    if fresh.rebases:
        fresh.base = fresh.base.repacked(fresh.rebased(kept, opened(fresh, MATRIX)))
    fresh.set_factors(kept)
    fresh.load_file_tensors(part.file_tensors())
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), part(x))


def test_plain_lora_keeps_nothing_and_needs_no_statistic() -> None:
    resolved = resolve(SubspaceConfig(method="lora", rank=3))
    part = resolved.method.build(pack(MATRIX, "nf4"), resolved.settings, torch.Generator().manual_seed(0), None)
    assert part.setup_statistic == "none" and part.kept_factors == () and not part.rebases
    torch.testing.assert_close(moved(part).merged_onto_original(MATRIX), MATRIX + product(part))


def test_options_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(UsageError, match=r"iterations is 3, but init kaiming"):
        resolve(SubspaceConfig(method="lora", options={"iterations": 3}))
    with pytest.raises(UsageError, match=r"init is 'loftq', but under mpc_n"):
        resolve(SubspaceConfig(method="rslora", constraint="mpc_n", options={"init": "loftq"}))
    with pytest.raises(UsageError, match=r"init is 'pissa'; accepted: kaiming, gaussian, loftq"):
        resolve(SubspaceConfig(method="lora", options={"init": "pissa"}))
