"""What a plain linear layer is: `nn.Linear`, a subclass that computes the same, GPT-2's `Conv1D`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from dist_subspace.module_places import buffers_of, children_of, parameters_of


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear`, a subclass of it that computes the same, or a `Conv1D`; nothing whose weight is made by a hook (weight
    normalisation, pruning), or whose forward was set on the instance."""
    if type(module) is nn.Linear or is_conv1d(module):
        return _holds_weight_and_bias(module) and "forward" not in module.__dict__
    return isinstance(module, nn.Linear) and "forward" not in module.__dict__ and _is_the_same(module)


def _holds_weight_and_bias(module: nn.Module) -> bool:
    """The bias may be None."""
    return set(parameters_of(module)) == {"weight", "bias"} and not buffers_of(module)


def _is_the_same(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` holds the same as that and computes the same: tried on a small one of its class, with the
    module's own settings. Falcon's adds the bias apart; others scale, round or gate."""
    kind = type(module)
    if not _holds_weight_and_bias(module) or children_of(module):
        return False
    if kind.__call__ is not nn.Module.__call__ or nn.parameter.is_lazy(module.weight):
        return False
    if kind.forward is nn.Linear.forward:
        return True
    if len(inspect.signature(kind.forward).parameters) != 2:  # a call may say more than the input
        return False
    # The caller's random numbers stay as they are: nothing is initialised, and no global generator is seeded.
    plain = nn.utils.skip_init(nn.Linear, 6, 5, bias=module.bias is not None, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    small = kind.__new__(kind)
    nn.Module.__init__(small)
    small.__dict__ |= {key: value for key, value in module.__dict__.items() if key not in small.__dict__}
    small.in_features, small.out_features = 6, 5
    small.weight, small.bias = plain.weight, plain.bias
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in plain.parameters():
            parameter.normal_(generator=generator)
        inputs = [torch.randn(shape, generator=generator, device="cpu") for shape in ((3, 6), (2, 3, 6))]
        try:
            for mode in (True, False):
                if not all(torch.allclose(small.train(mode)(x), plain(x), rtol=1e-5, atol=1e-6) for x in inputs):
                    return False
        except Exception:  # whatever a layer of that class needs that a linear layer does not have
            return False
    return True


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` holds `(in, out)`; it is recognised by name so that storage need not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module: Any) -> tuple[int, int]:
    """`(d_out, d_in)`, also of a layer whose weight is partitioned (then its own shape is empty)."""
    if is_conv1d(module):
        rows = int(module.nx) if hasattr(module, "nx") else int(module.weight.shape[0])
        return int(module.nf), rows
    return int(module.out_features), int(module.in_features)
