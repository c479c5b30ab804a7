"""The checkpoint's own matrix of a frozen operator, read again when it is asked for (docs/methods.md, "The original weight")."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.loading.sources import ConvertedOrigin
from dist_subspace.storage import FrozenLinear, FrozenStack, Origin


def original_of(operator: FrozenLinear) -> Tensor:
    """Local: `(d_out, d_in)` float32, on the operator's device.

    Raises:
        UsageError: the operator was not read from a checkpoint by `load_frozen`, or the file has gone.
    """
    stored = _read(operator.origin)
    _check_shape(operator.origin, stored, operator.shape[::-1] if operator.conv1d else operator.shape)
    logical = stored.t() if operator.conv1d else stored
    device = next(operator.parameters()).device
    return logical.to(device=device, dtype=torch.float32).contiguous()


def original_stack(stack: FrozenStack) -> Tensor:
    """Local: `(experts, d_out, d_in)` on the CPU, in the checkpoint's type.

    Raises:
        UsageError: as `original_of`.
    """
    stored = _read(stack.origin)
    d_out, d_in = stack.expert_shape
    _check_shape(stack.origin, stored, (stack.experts, *((d_in, d_out) if stack.transposed else (d_out, d_in))))
    return stored.transpose(1, 2) if stack.transposed else stored


def _read(origin: Origin | None) -> Tensor:
    """As the file holds it."""
    if origin is None:
        raise UsageError(
            "the original of a frozen weight is asked for, but this model was not read from a checkpoint by load_frozen; "
            "accepted: a model of load_frozen, or a setting that does not need it"
        )
    try:
        return _stored(origin)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"the original of a frozen weight is asked for, but {origin.file} no longer holds {origin.key}"
        ) from error


def _check_shape(origin: Origin | None, stored: Tensor, shape: tuple[int, ...]) -> None:
    if origin is not None and tuple(stored.shape) != shape:
        raise UsageError(
            f"{origin.file} holds {origin.key} as {list(stored.shape)} now: it is not the file that the "
            "model was read from"
        )


def _stored(origin: Origin) -> Tensor:
    if isinstance(origin, ConvertedOrigin):
        return origin.read()
    with safe_open(origin.file, framework="pt", device="cpu") as handle:
        return handle.get_tensor(origin.key)
