"""Where values lie: what torch makes of tensors by stacking, joining, cutting and turning is read from the same places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_subspace.loading.layout import Layout, rectangles, row_strides

FILE = {"a": torch.arange(60.0).view(3, 4, 5), "b": 100 + torch.arange(60.0).view(3, 4, 5), "c": torch.tensor(7.0)}


def of(key: str) -> Layout:
    return Layout.of(key, FILE[key].shape)


def values(layout: Layout) -> Tensor:
    """The tensor that the boxes say, each entry of which they say once."""
    made, seen = torch.zeros(layout.shape), torch.zeros(layout.shape)
    for box in layout.boxes:
        place = tuple(slice(at, at + size) for at, size in zip(box.start, box.shape, strict=True))
        made[place] = FILE[box.key].as_strided(box.shape, box.strides, box.offset)
        seen[place] += 1
    assert bool((seen == 1).all())
    return made


A, B = FILE["a"], FILE["b"]
MADE = {
    "as it is": (of("a"), A),
    "a number": (of("c"), FILE["c"]),
    "stacked": (Layout.cat([of("a").unsqueeze(0), of("b").unsqueeze(0)], 0), torch.stack([A, B])),
    "stacked last": (Layout.cat([of("a").unsqueeze(-1), of("b").unsqueeze(-1)], -1), torch.stack([A, B], -1)),
    "joined": (Layout.cat([of("a"), of("b")], 1), torch.cat([A, B], 1)),
    "cut across a joint": (Layout.cat([of("a"), of("b")], 1).narrow(1, 3, 2), torch.cat([A, B], 1).narrow(1, 3, 2)),
    "turned": (of("a").transpose(0, 2), A.transpose(0, 2)),
    "turned and cut": (of("a").permute((2, 0, 1)).narrow(0, 1, 3), A.permute(2, 0, 1).narrow(0, 1, 3)),
    "one of many": (of("b").narrow(-2, 1, 1).squeeze(-2), B[:, 1]),
    "in another shape": (of("a").narrow(0, 1, 2).view((8, 5)), A[1:].reshape(8, 5)),
}


@pytest.mark.parametrize("case", MADE)
def test_the_boxes_say_what_torch_makes(case: str) -> None:
    layout, expected = MADE[case]
    assert layout.shape == tuple(expected.shape) and layout.numel == expected.numel()
    assert torch.equal(values(layout), expected)


def test_only_one_piece_of_the_file_has_another_shape() -> None:
    for layout in (of("a").transpose(0, 1), of("a").narrow(1, 0, 2)):
        with pytest.raises(ValueError, match="cannot be seen as"):
            layout.view((layout.numel,))


def test_it_is_known_what_is_turned_and_what_is_read_entry_by_entry() -> None:
    assert not of("a").is_turned and of("a").transpose(1, 2).is_turned and of("a").transpose(1, 2).is_in_runs
    assert not of("a").narrow(2, 1, 1).is_in_runs and of("c").is_in_runs
    assert Layout.cat([of("a"), of("b")], 0).keys == ("a", "b")


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 4, 1, 3)])
def test_any_range_is_rectangles_one_after_the_other(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = list(rectangles(shape, start, stop))
            assert len(found) <= max(1, 2 * len(shape))
            entries = []
            for place, corner, sizes in found:
                part = whole[tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))].reshape(-1)
                assert place == int(part[0])
                entries += part.tolist()
            assert entries == list(range(start, stop))


def test_strides_are_those_of_rows() -> None:
    assert row_strides((3, 4, 5)) == A.stride() and row_strides(()) == ()
