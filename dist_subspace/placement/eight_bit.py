"""Moments that bitsandbytes holds in 8 bits, as the numbers they stand for: what a checkpoint stores, by parameter and whole.

An 8-bit optimizer (read: bitsandbytes 0.50.2) keeps codes (`state1`, uint8), their table (`qmap1`) and the largest magnitude
of every block of 256 codes (`absmax1`); of small tensors it keeps float32 (`state1` alone). Blocks are those of the tensor that
the optimizer was given: a parameter, or ZeRO's flat piece of many. So nothing of them can be found by a parameter's name, but
numbers can, and so can each number's block magnitude, without which packing the numbers again would round them once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
SCALE = "scale"
COUNTS = ".counts"
_MOMENTS = ("state1", "state2")


def has_packed(states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether some moment of the optimizer is held in 8 bits."""
    return any(f"qmap{key[-1]}" in state for state in states.values() for key in _MOMENTS)


@contextmanager
def unpacked(states: Mapping[Tensor, dict[str, Any]], *, rewritten: bool) -> Iterator[None]:
    """Local: within the block every moment is float32, and beside it lies its elements' block magnitude (`scale1`; zero where
    the moment is not packed), for whoever reads moments by their keys.

    Arguments:
        states: of the plain optimizer, by the tensors that it was given.
        rewritten: pack what the moments are at the end of the block; else they stay what they were.
    """
    if not has_packed(states):
        yield
        return
    before = [(state, {key: state[key] for key in _MOMENTS if key in state}) for state in states.values()]
    for state, held in before:
        for key in held:
            state[key], state[SCALE + key[-1]] = _numbers(state, key)
    try:
        yield
        if rewritten:
            for state, held in before:
                for key, codes in held.items():
                    _pack(state, key, codes)
    finally:
        for state, held in before:
            for key, codes in held.items():
                state[key] = codes
                state.pop(SCALE + key[-1])


def _numbers(state: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor]:
    codes, table = state[key], state.get(f"qmap{key[-1]}")
    if table is None:
        return codes, torch.zeros_like(codes)
    scales = state[f"absmax{key[-1]}"].repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return table[codes.long()] * scales + 0.0, scales  # no zero is negative: a block that is empty has any codes


def _pack(state: Mapping[str, Any], key: str, codes: Tensor) -> None:
    """Into the optimizer's own tensors. A block whose elements had one magnitude keeps it, and then its codes too."""
    table = state.get(f"qmap{key[-1]}")
    if table is None:
        return
    numbers, scales = _blocks(state[key]), _blocks(state[SCALE + key[-1]])
    largest, first = numbers.abs().amax(dim=1), scales[:, 0]
    inside = torch.arange(scales.numel(), device=scales.device).view_as(scales) < codes.numel()
    kept = ((scales == first[:, None]) | ~inside).all(dim=1) & (first >= largest)
    magnitude = torch.where(kept, first, largest)
    shares = numbers / torch.where(magnitude > 0, magnitude, 1.0)[:, None]
    nearest = torch.searchsorted((table[1:] + table[:-1]) / 2, shares)
    codes.copy_(nearest.view(-1)[: codes.numel()].view(codes.shape))
    state[f"absmax{key[-1]}"].copy_(magnitude)


def _blocks(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


# In a file a magnitude is written once for the elements that share it.


def is_scale(key: str) -> bool:
    return key.startswith(SCALE)


def shortened(name: str, scales: Tensor) -> dict[str, Tensor]:
    """Runs of equal magnitudes, for a file."""
    values, counts = torch.unique_consecutive(scales.reshape(-1), return_counts=True)
    return {name: values, name + COUNTS: counts.to(torch.int32)}


def lengthened(name: str, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The inverse; zeros where the file has none."""
    if name + COUNTS not in tensors:
        return torch.zeros_like(like)
    return tensors[name].repeat_interleave(tensors[name + COUNTS].long()).view(like.shape)
