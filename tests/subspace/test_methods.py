"""What every registered method promises: identity at the start, product form equal to its dense form, exact files."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.storage import pack, storages
from dist_subspace.subspace import (
    FrozenFactor,
    Operator,
    SubspaceConfig,
    SubspaceLinear,
    keeps_factors,
    methods,
    resolve,
)
from dist_subspace.subspace.blocks.projections import Projections
from tests.alive import Made
from tests.subspace.golden import settled

SHAPES = [(12, 8), (8, 12), (7, 5), (9, 9)]
each_method = pytest.mark.parametrize("method", sorted(n for n, info in methods().items() if info.uses_targets))
each_storage = pytest.mark.parametrize("storage", sorted(storages()))


def layer(
    method: str, shape: tuple[int, int] = (12, 8), storage: str = "fp32", *, transposed: bool = False, seed: int = 0
) -> SubspaceLinear:
    rank = 3 if methods()[method].uses_rank else None
    resolved = resolve(SubspaceConfig(method=method, rank=rank))
    weight = torch.randn(*reversed(shape) if transposed else shape)
    base = pack(weight, storage, transposed=transposed, bias=torch.randn(shape[0]))
    return settled(resolved.method.build(base, resolved.settings, torch.Generator().manual_seed(seed), None))


def randomise(module: SubspaceLinear, size: float = 0.3) -> SubspaceLinear:
    for parameter in module.trainables().values():
        parameter.data.normal_(std=size)
    return module


@each_method
@each_storage
def test_at_the_start_the_output_is_the_frozen_layers_own(method: str, storage: str) -> None:
    for transposed in (False, True):
        module = layer(method, storage=storage, transposed=transposed)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 3, 8, dtype=dtype)
            after = module(x)
            module.enabled = False
            assert torch.equal(after, module(x)), "not exactly the identity"
            module.enabled = True


@each_method
@each_storage
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_form_is_the_dense_form(method: str, storage: str, shape: tuple[int, int]) -> None:
    if not methods()[method].mergeable:
        pytest.skip(f"{method} has no dense form")
    for transposed in (False, True):
        module = randomise(layer(method, shape, storage, transposed=transposed))
        x = torch.randn(2, 3, shape[1], requires_grad=True)
        y = module(x)
        dense = module.merged(module.base.dense())
        expected = x.detach() @ dense.t() + module.merged_bias(module.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        g = torch.randn_like(y)
        y.backward(g)
        torch.testing.assert_close(x.grad, g @ dense, rtol=1e-4, atol=1e-4)


@each_method
@each_storage
def test_gradients_of_the_trained_are_autograds_on_the_dense_form(method: str, storage: str) -> None:
    """`merged` as a plain differentiable formula is the reference: the product form's own backward is not used in it."""
    if not methods()[method].mergeable:
        pytest.skip(f"{method} has no dense form")
    module = randomise(layer(method, storage=storage))
    x, g = torch.randn(5, 8), torch.randn(5, 12)
    names, parameters = zip(*module.trainables().items(), strict=True)
    actual = torch.autograd.grad(module(x), parameters, g)
    dense = module.merged(module.base.dense())
    expected = torch.autograd.grad(x @ dense.t() + module.merged_bias(module.bias), parameters, g)
    for name, a, e in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@each_method
def test_no_frozen_tensor_ever_gets_a_gradient(method: str) -> None:
    module = randomise(layer(method))
    module(torch.randn(5, 8, requires_grad=True)).sum().backward()
    for name, parameter in module.named_parameters():
        trained = name in module.trainables()
        assert parameter.requires_grad == trained and (parameter.grad is not None) == trained, name


@each_method
def test_parameters_are_float32_and_their_gradients_too_whatever_the_computation(method: str) -> None:
    module = randomise(layer(method))
    for dtype in (torch.bfloat16, torch.float16):
        module.zero_grad()
        y = module(torch.randn(5, 8, dtype=dtype, requires_grad=True))
        y.float().sum().backward()
        assert y.dtype == dtype
        for name, parameter in module.trainables().items():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


@each_method
def test_initial_values_are_a_function_of_the_seed(method: str) -> None:
    torch.manual_seed(0)
    first = layer(method, seed=1).trainables()
    torch.manual_seed(0)  # the same frozen matrix
    again = layer(method, seed=1).trainables()
    assert all(torch.equal(first[name], again[name]) for name in first)


@each_method
def test_the_files_tensors_restore_the_layer_exactly(method: str) -> None:
    source, target = randomise(layer(method)), layer(method)
    target.base = source.base
    target.bias = source.bias
    if keeps_factors(source):
        target.set_factors(source.factor_tensors())
    else:
        settled(target)  # what is made from the base alone is made from this base
    target.load_file_tensors(source.file_tensors())
    x = torch.randn(3, 8)
    torch.testing.assert_close(target(x), source(x), rtol=1e-6, atol=1e-6)
    again = target.file_tensors()
    assert all(torch.equal(again[name], t) for name, t in source.file_tensors().items())


@each_method
def test_parameters_cast_to_16_bits_by_an_engine_still_work(method: str) -> None:
    module = randomise(layer(method)).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in module.trainables().values())
    assert module(x.detach()).dtype == torch.bfloat16


@each_method
def test_no_tokens_give_no_tokens(method: str) -> None:
    """A rank whose micro-batch is empty makes the same calls as the others."""
    module = randomise(layer(method))
    y = module(torch.zeros(0, 8, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 12)
    assert all(p.grad is not None and not p.grad.any() for p in module.trainables().values())


@each_method
def test_one_call_of_the_frozen_operator_a_forward(method: str) -> None:
    calls: list[Tensor] = []
    module = layer(method)
    module.base.register_forward_hook(lambda base, inputs, output: calls.append(output))
    module(torch.randn(3, 8))
    assert len(calls) == 1


@each_method
@each_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_as_large_as_the_weight_lives_from_forward_to_backward(
    method: str, storage: str, dtype: torch.dtype
) -> None:
    """Neither a dequantised copy nor a view of what an engine has gathered: not saved by autograd, not held by a node."""
    module = randomise(layer(method, (40, 30), storage))
    x = torch.randn(3, 30, dtype=dtype, requires_grad=True)
    with Made(40 * 30) as made:
        y = module(x)
    assert made.noted, "the matrix was not seen where it is used"
    assert made.alive == []
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


@each_method
def test_every_method_says_what_it_is(method: str) -> None:
    info = methods()[method]
    assert info.name == method and info.reference and info.category and info.summary and info.count
    assert info.uses_rank == (info.rank is not None)


@each_method
def test_a_module_moves_and_is_counted_as_one(method: str) -> None:
    module = layer(method)
    children = [child for child in module.children() if not isinstance(child, FrozenFactor | Projections)]
    assert isinstance(module, nn.Module) and children == [module.base]
    assert set(dict(module.named_parameters(recurse=False))) - {"bias"} >= set(module.trainables())


def test_an_unknown_method_is_refused_with_the_nearest_and_all_accepted() -> None:
    with pytest.raises(UsageError, match=r"subspace\.method is 'lorra' \(did you mean 'lora'\?\); accepted: .*ssb"):
        resolve(SubspaceConfig(method="lorra"))


def in_place(y: Tensor) -> Tensor:
    y.clamp_(-2.0, 2.0)
    y[..., :2] = 0.25
    y *= 1.5
    y += 0.5
    return y


def out_of_place(y: Tensor) -> Tensor:
    y = y.clamp(-2.0, 2.0)
    return torch.cat([torch.full_like(y[..., :2], 0.25), y[..., 2:]], -1) * 1.5 + 0.5


@each_method
@each_storage
@pytest.mark.parametrize("enabled", [True, False])
def test_a_model_may_change_the_output_in_place(method: str, storage: str, enabled: bool) -> None:
    """As OLMo's `clamp_` and Llama 4's `*=` do; with a bias, which makes a new tensor, nothing would show."""
    module = randomise(layer(method, storage=storage))
    module.bias, module.enabled = None, enabled
    found = []
    for change in (in_place, out_of_place):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        trained = list(module.trainables().values()) if enabled else []
        y = change(module(x))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True)])
    assert len(found[0]) == len(found[1]) and all(
        torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None
    )


@pytest.mark.parametrize("storage", storages())
def test_a_frozen_matrix_is_known_as_an_operator_on_every_python(storage: str) -> None:
    """From Python 3.12 on, isinstance asks a protocol's names of the class and the instance's own dictionary, where a module's
    parameters and buffers are not."""
    operator = pack(torch.randn(6, 8), storage)
    names = {*Operator.__annotations__, *(name for name, value in vars(Operator).items() if name in ASKED and value)}
    assert names == {"in_features", "out_features", "training", *ASKED}
    for name in names:
        inspect.getattr_static(operator, name)
    assert isinstance(operator, Operator) and not isinstance(nn.Linear(6, 8), Operator)


ASKED = ("__call__", "parameters", "dense")
