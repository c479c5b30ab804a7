"""A conversion is followed to the places of the file that it takes values from, or it is said that it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.loading.traced import NotFollowed, Traced, traced

Make = Callable[[Sequence[Any]], Any]
SHAPE = (4, 6, 8)
MADE: dict[str, Make] = {
    "stack": lambda t: torch.stack(t, dim=1),
    "cat": lambda t: torch.cat([t[0], t[1], t[2]], dim=-1),
    "chunk": lambda t: torch.chunk(t[0], 3, dim=1)[1],
    "uneven split": lambda t: torch.split(t[0], [1, 5], dim=-2)[1].contiguous(),
    "split": lambda t: t[1].split(2, dim=0)[1],
    "transpose": lambda t: torch.transpose(t[0], dim0=1, dim1=2).contiguous(),
    "t": lambda t: t[0].unbind(0)[2].t(),
    "permute": lambda t: t[0].permute(2, 0, 1).clone(),
    "select": lambda t: torch.select(t[2], 0, 3).unsqueeze(0),
    "narrow": lambda t: t[2].narrow(1, 2, 3),
    "squeeze": lambda t: torch.chunk(t[0], 4, dim=0)[3].squeeze(0),
    "reshape": lambda t: t[0].reshape(t[0].shape[0], -1),
    "experts": lambda t: torch.cat([torch.stack(t[:2]), torch.stack(t[1:])], dim=2).transpose(-1, -2),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_read_is_what_torch_makes(name: str, tmp_path: Path) -> None:
    tensors = {key: torch.randn(SHAPE).bfloat16() for key in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    made = MADE[name]([traced(key, SHAPE, torch.bfloat16) for key in tensors])
    expected = made_of(tensors, name)
    assert isinstance(made, Traced) and made.shape == expected.shape
    layout = made.layout_in_file
    with RangeReader(open_checkpoint(tmp_path)) as reader:
        for start, stop in ((0, layout.numel), (5, layout.numel - 3), (layout.numel // 2, layout.numel)):
            ((_, values),) = reader.entries(layout, start, stop, 1)
            assert torch.equal(values, expected.reshape(-1)[start:stop])


def made_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    result = MADE[name](list(tensors.values()))
    assert isinstance(result, Tensor)
    return result


def changed(t: Tensor) -> Tensor:
    t[0] = 0
    return t


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[0] + 1,
        lambda t: t[0].float(),
        lambda t: t[0].mul_(2),
        lambda t: changed(t[0]),
        lambda t: torch.cat([t[0], torch.zeros(SHAPE, device="meta", dtype=torch.bfloat16)]),
        lambda t: t[0].flip(0),
        lambda t: t[0].transpose(0, 1).reshape(-1),
        lambda t: t[0][:, ::2],
    ],
)
def test_what_is_more_than_pieces_is_not_followed(make: Make) -> None:
    with pytest.raises(NotFollowed):
        make([traced(key, SHAPE, torch.bfloat16) for key in "abc"])


def test_questions_are_answered() -> None:
    tensor = traced("a", SHAPE, torch.bfloat16)
    assert tensor.shape == SHAPE and tensor.dim() == 3 and tensor.dtype == torch.bfloat16 and tensor.is_meta
    assert isinstance(tensor, Tensor) and tensor.size(0) == 4 and tensor.numel() == 4 * 6 * 8
