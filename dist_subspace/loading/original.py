"""The checkpoint's own matrix of a frozen operator, read again when it is asked for (docs/methods.md, "The original weight")."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.loading.sources import ConvertedOrigin
from dist_subspace.storage import FrozenLinear, Origin


def original_of(operator: FrozenLinear) -> Tensor:
    """Local: `(d_out, d_in)` float32, on the operator's device.

    Raises:
        UsageError: the operator was not read from a checkpoint by `load_frozen`, or the file has gone.
    """
    if operator.origin is None:
        raise UsageError(
            "the original of a frozen weight is asked for, but this model was not read from a checkpoint by load_frozen; "
            "accepted: a model of load_frozen, or a setting that does not need it"
        )
    try:
        stored = _stored(operator.origin)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"the original of a frozen weight is asked for, but {operator.origin.file} no longer holds {operator.origin.key}"
        ) from error
    if tuple(stored.shape) != (operator.shape[::-1] if operator.conv1d else operator.shape):
        raise UsageError(
            f"{operator.origin.file} holds {operator.origin.key} as {list(stored.shape)} now: it is not the file that the "
            "model was read from"
        )
    logical = stored.t() if operator.conv1d else stored
    device = next(operator.parameters()).device
    return logical.to(device=device, dtype=torch.float32).contiguous()


def _stored(origin: Origin) -> Tensor:
    if isinstance(origin, ConvertedOrigin):
        return origin.read()
    with safe_open(origin.file, framework="pt", device="cpu") as handle:
        return handle.get_tensor(origin.key)
