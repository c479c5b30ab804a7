"""Every storage as a linear operator: right at every width, and nothing of the weight kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.storage import FrozenLinear, Origin, pack, storage_info, storages

# A LLaMA whose widths fit no kernel, odd numbers of elements, one column, one row, and one that fits.
SHAPES = [(172, 64), (64, 172), (7, 5), (33, 31), (9, 1), (1, 9), (128, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Units of the result's own size: sums of some hundred products in the type of the activations.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

each_storage = pytest.mark.parametrize("storage", sorted(storages()))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operator(shape: tuple[int, int], storage: str, *, transposed: bool = False, bias: bool = False) -> FrozenLinear:
    weight = torch.randn(*reversed(shape) if transposed else shape)
    return pack(
        weight, storage, transposed=transposed, bias=torch.randn(shape[0]) if bias else None, double_quant=False
    )


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    size = expected.abs().max().item() + 1e-6
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype] * size)


@each_storage
@each_dtype
@each_shape
def test_product_and_gradient_are_those_of_the_dense_matrix(
    storage: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for transposed in (False, True):
        for bias in (False, True):
            frozen = operator(shape, storage, transposed=transposed, bias=bias)
            dense = frozen.dense()
            assert dense.shape == frozen.shape == shape and dense.dtype == torch.float32
            x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
            y = frozen(x)
            g = torch.randn(y.shape, dtype=dtype)
            y.backward(g)
            expected = x.detach().float() @ dense.t() + (frozen.bias.float() if frozen.bias is not None else 0)
            assert y.dtype == dtype and y.shape == (2, 3, shape[0])
            close(y, expected, dtype)
            assert x.grad is not None and x.grad.dtype == dtype
            close(x.grad, g.float() @ dense, dtype)


@each_storage
def test_the_matrix_held_is_near_the_one_given(storage: str) -> None:
    weight = torch.randn(64, 128)
    # Of the largest weight. A float of 8 bits has 3 after the point: half a unit of its largest numbers is 2^-4 or less.
    near = {4: 0.35, 8: 0.07 if storage == "fp8" else 0.03, 16: 0.01, 32: 0.0}[storage_info(storage).bits]
    for transposed in (False, True):
        frozen = pack(weight.t().contiguous() if transposed else weight, storage, transposed=transposed)
        assert (frozen.dense() - weight).abs().max() <= near * weight.abs().max()


@each_storage
@pytest.mark.parametrize("transposed", [False, True])
def test_who_writes_into_the_dense_matrix_does_not_write_into_the_weight(storage: str, transposed: bool) -> None:
    """As a decomposition does, in place: its matrix is a copy, whatever the storage."""
    frozen = operator((7, 5), storage, transposed=transposed)
    x, dense = torch.randn(2, 5), frozen.dense()
    before = frozen(x)
    assert dense.is_contiguous()
    dense.zero_()
    assert torch.equal(frozen(x), before) and before.any()


@each_storage
def test_a_transposed_weight_is_held_as_the_same_matrix(storage: str) -> None:
    weight = torch.randn(33, 31)
    plain, turned = pack(weight, storage), pack(weight.t().contiguous(), storage, transposed=True)
    assert torch.equal(plain.dense(), turned.dense())


@each_storage
def test_the_frozen_product_saves_no_tensor_for_backward(storage: str) -> None:
    frozen = operator((172, 64), storage, bias=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        frozen(x).sum()
    assert saved == []


@pytest.mark.parametrize("double_quant", [False, True])
@each_storage
def test_products_are_those_of_the_plain_layer_that_holds_the_same_matrix(storage: str, double_quant: bool) -> None:
    """torch's own linear layer on the dequantised weights, whatever the layout: output, gradient, bias, types."""
    for transposed in (False, True):
        weight, bias = torch.randn(45, 70), torch.randn(45)
        held = pack(
            weight.t().contiguous() if transposed else weight,
            storage,
            transposed=transposed,
            bias=bias,
            double_quant=double_quant,
        )
        plain = torch.nn.functional.linear
        assert held.bias is not None and torch.equal(held.bias.data, bias) and held.conv1d == transposed
        for dtype in DTYPES:
            x = torch.randn(2, 3, 70, dtype=dtype, requires_grad=True)
            wide = x.detach().double().requires_grad_()
            right = plain(wide, held.dense(torch.float64), bias.double())
            y, g = held(x), torch.randn(2, 3, 45, dtype=dtype)
            assert y.dtype == dtype
            close(y, right.detach(), dtype)
            close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(right, wide, g.double())[0], dtype)


@each_storage
def test_training_and_evaluation_give_the_same_output(storage: str) -> None:
    frozen = operator((172, 64), storage, bias=True)
    for tokens in (1, 5):  # one token takes another kernel in bitsandbytes
        x = torch.randn(1, tokens, 64, dtype=torch.bfloat16)
        trained = frozen.train()(x.requires_grad_(True)).detach()
        with torch.no_grad():
            assert torch.equal(frozen.eval()(x), trained)
        assert torch.equal(frozen.eval()(x.detach()), trained)


@each_storage
def test_backward_reads_the_weight_again(storage: str) -> None:
    """A sharding engine releases the weight after forward and gathers it anew for backward."""
    first, second = operator((24, 40), storage), operator((24, 40), storage)
    x = torch.randn(3, 40, requires_grad=True)
    y = first(x)
    for name, parameter in first.named_parameters():
        parameter.data = second.get_parameter(name).data
    y.sum().backward()
    close(x.grad, torch.ones(3, 24) @ second.dense(), torch.float32)


@each_storage
def test_every_byte_is_a_frozen_parameter_and_none_a_buffer(storage: str) -> None:
    """What is no parameter, ZeRO-3 does not split."""
    for double_quant in (False, True):
        frozen = pack(torch.randn(64, 64), storage, bias=torch.randn(64), double_quant=double_quant)
        assert not list(frozen.buffers())
        assert not any(p.requires_grad for p in frozen.parameters())
        loose = [name for name, value in vars(frozen).items() if isinstance(value, Tensor)]
        assert loose == []
        stored = sum(p.numel() * p.element_size() for name, p in frozen.named_parameters() if name != "bias")
        assert stored >= 64 * 64 * storage_info(storage).bits / 8


@each_storage
def test_no_gradient_is_asked_of_what_needs_none(storage: str) -> None:
    frozen = operator((24, 40), storage, bias=True)
    assert not frozen(torch.randn(3, 40)).requires_grad
    with torch.no_grad():
        assert not frozen(torch.randn(3, 40, requires_grad=True)).requires_grad


@each_storage
def test_under_autocast_the_product_runs_in_the_type_of_autocast(storage: str) -> None:
    frozen = operator((24, 40), storage)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(torch.randn(3, 40)).dtype == torch.bfloat16


@each_storage
def test_no_tokens_give_no_tokens(storage: str) -> None:
    frozen = operator((24, 40), storage, bias=True)
    x = torch.zeros(0, 40, requires_grad=True)
    frozen(x).sum().backward()
    assert frozen(x).shape == (0, 24) and x.grad is not None and x.grad.shape == (0, 40)


@each_storage
def test_the_origin_is_remembered(storage: str) -> None:
    frozen = pack(torch.randn(4, 4), storage, origin=Origin("model.safetensors", "a.weight"))
    assert frozen.origin == Origin("model.safetensors", "a.weight")


def test_an_unknown_storage_is_refused_with_the_nearest_and_all_accepted() -> None:
    with pytest.raises(UsageError, match=r"storage is 'nf5' \(did you mean 'nf4'\?\); accepted: .*fp32.*int8"):
        pack(torch.randn(4, 4), "nf5")


@each_storage
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (2, 1, 3, 40), (40,)])
def test_the_output_is_a_tensor_of_its_own_that_may_be_changed_in_place(storage: str, shape: tuple[int, ...]) -> None:
    frozen, grads = operator((24, 40), storage, bias=False), []
    for in_place in (True, False):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = frozen(x)
        assert not y._is_view() and y.shape == (*shape[:-1], 24)
        z = y.clamp_(-1, 1) if in_place else y.clamp(-1, 1)
        grads.append(torch.autograd.grad(z.square().sum(), x)[0])
    assert torch.equal(*grads)
