"""DoRA: golden numbers and gradients, rows that vanish, dropout as published, PEFT's layer, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dist_subspace.storage import pack
from dist_subspace.subspace import SubspaceConfig, SubspaceLinear, resolve
from dist_subspace.subspace.blocks.dropout import Dropout
from dist_subspace.subspace.blocks.magnitude import deviation
from tests.subspace.golden import BIAS, X2, A, B, G, W, X, give, layer, settled
from tests.subspace.peft_reference import peft_model

NORMS = torch.tensor([6.0, 14, 18]).sqrt()
M = torch.tensor([3.0, 4, 5])
GOLDEN = torch.tensor([[2.875118145, 3.6232865093, 0]])


def golden(magnitude: Tensor | None = M, **config: Any) -> SubspaceLinear:
    module = give(layer("dora", rank=2, alpha=4.0, **config), lora_A=A, lora_B=B)
    return module if magnitude is None else give(module, lora_magnitude_vector=magnitude - NORMS)


def with_matrix(weight: Tensor, **config: Any) -> SubspaceLinear:
    """The layer on another matrix, at the fixture's factors."""
    resolved = resolve(SubspaceConfig("dora", rank=2, alpha=4.0, **config))
    part = resolved.method.build(pack(weight.clone(), "fp32"), resolved.settings, torch.Generator(), None)
    return give(settled(part), lora_A=A, lora_B=B)


def formula(module: Any, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """The definition on dense matrices under ordinary autograd; with dropout as the official code has it."""
    changed = W + 2 * module.lora_B @ module.lora_A
    n = changed.norm(dim=1)
    ratio = (NORMS + module.lora_magnitude_vector) / (
        n if module.settings.options["differentiate_norm"] else n.detach()
    )
    if dropped is None:
        return ratio * (x @ changed.t())
    return x @ W.t() + (ratio - 1) * (dropped @ W.t()) + ratio * (dropped @ (changed - W).t())


def assert_same_gradients(module: Any, actual: Tensor, expected: Tensor, x: Tensor) -> None:
    inputs = [x, *module.trainables().values()]
    g = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(actual, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        # Sums of float32 in two orders: their last bits differ with the machine's instructions.
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_golden_one(transposed: bool) -> None:
    torch.testing.assert_close(golden(transposed=transposed)(X), GOLDEN)
    module = golden(None, transposed=transposed)
    torch.testing.assert_close(module.row_norms, NORMS)
    torch.testing.assert_close(module(X), torch.tensor([[2.3475241352, 3.3892741829, 0]]))
    torch.testing.assert_close(golden(bias=True)(X), GOLDEN + BIAS)


def test_gradients_are_the_golden_ones() -> None:
    module = golden()
    x = X.clone().requires_grad_(True)
    module(x).backward(G)
    torch.testing.assert_close(module.lora_magnitude_vector.grad, torch.tensor([0.958372715, -1.8116432546, 0]))
    torch.testing.assert_close(x.grad, torch.tensor([[1.1011503691, -5.4467710501, -3.4093005592, 4.023272597]]))
    row_a = [-0.4516544726, -0.9033089453, 0.4516544726, -0.2258272363]
    row_b = [-2.2869802997, -4.5739605994, 2.2869802997, -1.1434901499]
    torch.testing.assert_close(module.lora_A.grad, torch.tensor([row_a, row_b]))
    grad_b = [[2.6539552108, 0.8846517369], [-5.4349297639, -1.8116432546], [4.0089186287, 1.3363062096]]
    torch.testing.assert_close(module.lora_B.grad, torch.tensor(grad_b))


def test_with_dropout_it_is_the_golden_one() -> None:
    module = golden(dropout=0.5).train()
    wanted = torch.tensor([[2.0, 0, -2, 1]])
    for seed in range(1000):
        torch.manual_seed(seed)
        if torch.equal(Dropout(0.5, X)(X), wanted):
            break
    torch.manual_seed(seed)
    torch.testing.assert_close(module(X), torch.tensor([[3.0195397639, 2.5650702361, -14.6904496765]]))
    torch.testing.assert_close(module.eval()(X), GOLDEN)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("differentiate_norm", [False, True])
def test_gradients_are_those_of_the_formula(dropout: float, differentiate_norm: bool) -> None:
    module = golden(dropout=dropout, options={"differentiate_norm": differentiate_norm}).train()
    for seed in range(3):
        x = torch.randn(2, 5, 4, requires_grad=True)
        torch.manual_seed(seed)
        actual = module(x)
        torch.manual_seed(seed)
        dropped = Dropout(dropout, x.reshape(-1, 4))(x.reshape(-1, 4)).view_as(x) if dropout else None
        expected = formula(module, x, dropped)
        torch.testing.assert_close(actual, expected)
        assert_same_gradients(module, actual, expected, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_draws_the_same_mask_when_checkpointing_recomputes(reentrant: bool) -> None:
    module = golden(dropout=0.5).train()
    x = torch.randn(6, 4, requires_grad=True)
    inputs = [x, *module.trainables().values()]
    torch.manual_seed(3)
    plain = torch.autograd.grad(module(x).square().sum(), inputs)
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    for expected, tensor in zip(plain, inputs, strict=True):
        torch.testing.assert_close(tensor.grad, expected)


def test_where_the_magnitude_is_the_norm_it_is_lora() -> None:
    changed_norms = torch.tensor([46.0, 78, 14]).sqrt()
    lora = give(layer("lora", rank=2, alpha=4.0), lora_A=A, lora_B=B)
    torch.testing.assert_close(golden(changed_norms)(X), lora(X))


def test_a_row_of_zeros_is_not_rescaled_and_its_magnitude_does_not_learn() -> None:
    weight = W.clone()
    weight[1] = 0
    module = with_matrix(weight)
    give(module, lora_magnitude_vector=torch.tensor([1.0, 1, 1]))
    lora = give(layer("lora", rank=2, alpha=4.0), lora_A=A, lora_B=B)
    y = module(X2)
    torch.testing.assert_close(y[0, 1], (lora(X2) - X2 @ W.t())[0, 1])
    torch.testing.assert_close(y, X2 @ module.merged(weight).t())
    y.sum().backward()
    gradient = module.lora_magnitude_vector.grad
    assert gradient[1] == 0 and gradient[0] != 0 and gradient[2] != 0


def test_an_update_that_cancels_its_row_stays_finite() -> None:
    weight = W.clone()
    weight[0] = -2 * (B @ A)[0]  # γ B A takes the row away
    module = with_matrix(weight)
    x = torch.randn(5, 4, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in module.trainables().values())
    assert torch.isfinite(module.merged(weight)).all()


def test_an_update_that_cancels_its_row_to_the_last_bit_stays_finite() -> None:
    weight = torch.tensor([[3.0, 4, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    module = with_matrix(weight)
    give(module, lora_A=torch.tensor([[-1.5, -2, 0, 0], [0, 0, 0, 0]]), lora_B=torch.tensor([[1.0, 0], [0, 0], [0, 0]]))
    y = module(torch.randn(5, 4))
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in module.trainables().values())
    assert not y[:, 0].any()


def test_a_row_too_small_to_be_squared_in_float32_starts_as_it_is() -> None:
    weight = W * torch.tensor([[1e-30], [1], [1]])
    module = give(with_matrix(weight), lora_B=torch.zeros_like(B))
    torch.testing.assert_close(module(X), X @ weight.t(), rtol=1e-6, atol=0)


def test_norms_are_float32_under_autocast() -> None:
    given = (M - NORMS, NORMS, W @ A.t(), A, 1.001 * B, 2.0, False)
    expected = deviation(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deviation(*given), expected)


def test_a_scale_near_one_is_not_rounded_to_16_bits() -> None:
    module = with_matrix(torch.eye(3, 4))
    give(module, lora_B=torch.zeros_like(B), lora_magnitude_vector=torch.full((3,), 3 / 1024))
    x = torch.tensor([[1.9921875, 0, 0, 0]], dtype=torch.bfloat16)
    assert module(x)[0, 0] == 2  # 1.998; the scale itself would be 1 in bfloat16


def test_norms_are_float32_whatever_an_engine_casts_parameters_to() -> None:
    module = golden(None).to(torch.bfloat16)
    assert module.row_norms.dtype == torch.float32 and torch.equal(module.row_norms, golden(None).row_norms)


def test_peft_computes_the_same_from_the_file() -> None:
    module = golden(bias=True)
    assert set(module.file_tensors()) == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    torch.testing.assert_close(module.file_tensors()["lora_magnitude_vector"], M)
    theirs = peft_model(module)
    torch.testing.assert_close(theirs(X), GOLDEN + BIAS)
    torch.testing.assert_close(peft_model(module, transposed=True)(X), GOLDEN + BIAS)
    layer_of_peft = theirs.base_model.model.proj
    module(X).backward(G)
    theirs.train()(X).backward(G)
    pairs: list[tuple[nn.Parameter, Tensor]] = [
        (module.lora_A, layer_of_peft.lora_A["default"].weight),
        (module.lora_B, layer_of_peft.lora_B["default"].weight),
        (module.lora_magnitude_vector, layer_of_peft.lora_magnitude_vector["default"].weight),
    ]
    for mine, reference in pairs:
        torch.testing.assert_close(mine.grad, reference.grad)


class Made(TorchDispatchMode):
    """The shapes of all tensors that operators make, views of `held` apart."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held, self.shapes = held.untyped_storage().data_ptr(), set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.held:
            self.shapes.add(tuple(result.shape))
        return result


def test_a_step_makes_no_dense_matrix_and_multiplies_little_more_than_lora() -> None:
    flops: dict[str, int] = {}
    for method in ("lora", "dora"):
        resolved = resolve(SubspaceConfig(method, rank=16))
        part = resolved.method.build(pack(torch.randn(320, 256), "fp32"), resolved.settings, torch.Generator(), None)
        part = settled(part)
        x = torch.randn(512, 256, requires_grad=True)
        with FlopCounterMode(display=False) as counter, Made(part.base.weight) as made:  # type: ignore[arg-type]
            part.train()(x).sum().backward()
        assert not made.shapes & {(320, 256), (256, 320)}
        flops[method] = counter.get_total_flops()
    assert flops["dora"] <= 1.10 * flops["lora"]


def test_evaluation_asks_for_the_norms_once_and_again_after_training() -> None:
    module = golden().eval()
    rows: list[int] = []
    module.base.register_forward_hook(lambda base, inputs, output: rows.append(len(output)))
    with torch.no_grad():
        first, second = module(X), module(X)
        assert rows == [1 + 2, 1] and torch.equal(first, second)
        module.train()
        give(module, lora_magnitude_vector=torch.zeros(3))
        torch.testing.assert_close(module.eval()(X), golden(None)(X))
        module.load_file_tensors(golden().file_tensors())
        torch.testing.assert_close(module(X), GOLDEN)
        module.load_state_dict(golden(None).state_dict())
        torch.testing.assert_close(module(X), golden(None)(X))
        module.load_state_dict(golden().state_dict())
        torch.testing.assert_close(module(X), GOLDEN)
    give(module, lora_magnitude_vector=torch.zeros(3))
    torch.testing.assert_close(module(X), golden(None)(X))  # gradients are wanted: parameters may have moved


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_parameter_that_is_written_to_in_evaluation_acts_at_once(name: str) -> None:
    module = golden().eval()
    with torch.no_grad():
        before = module(X)
        module.get_parameter(name).mul_(1.5)
        fresh = give(golden(), **{own: p.data for own, p in module.trainables().items()})
        assert not torch.allclose(module(X), before)
        torch.testing.assert_close(module(X), fresh(X))


def test_a_constraint_acts_on_a_alone() -> None:
    module = golden(constraint="mpc_o")
    assert module.constrained_factors()[0] is module.lora_A and module.constrained_factors()[1] is None
    assert "A alone" in module.info.notices["mpc_o"]


def test_seventeen_values_are_trained() -> None:
    assert sum(p.numel() for p in layer("dora", rank=2).trainables().values()) == 17
