"""The type of the computation where nobody gave one: what the processors multiply fast."""

from __future__ import annotations

import torch

from dist_subspace.placement.collectives import any_rank
from dist_subspace.storage import storage_info
from dist_subspace.torch_internals import cpu_multiplies

SLOW = torch.float32  # of a processor without 16-bit products: bfloat16 takes twice the time there


def unset_type(storage: str, device: torch.device, *, together: bool) -> torch.dtype:
    """Collective where `together`: a float storage's own type, and else bfloat16, or float32 where a rank computes on a processor
    that would be slow in 16 bits.

    Arguments:
        device: where this rank computes.
        together: whether all ranks decide; else this one alone.
    """
    own = storage_info(storage).dtype
    if own is not None:
        return own
    slow = device.type == "cpu" and not cpu_multiplies(torch.bfloat16)
    return SLOW if (any_rank(slow) if together else slow) else torch.bfloat16
