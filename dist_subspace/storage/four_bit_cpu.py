"""bitsandbytes' 4-bit quantiser for CPUs, with the search for the nearest of 16 values written so that a CPU does many at once.

bitsandbytes calls `torch.bucketize`, which walks a tree for every entry and takes nine tenths of the time. Here an entry's place
is looked up: [-1, 1] is cut into cells, at most one bound lies in each, and an entry is compared with the one bound of its cell.
Everything else is done as there, operation by operation, and so the bytes are the same (tests/storage/test_four_bit_cpu.py).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PIECE = 1 << 16  # entries that a thread works on at a time: they and what is made of them stay in its cache
SMALLEST = 1e-38  # a statistic is never less, so that it can be divided by
CELLS = 4096  # a power of two, so that scaling by it rounds nothing


def quantize_blocks(flat: Tensor, values: tuple[float, ...], blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 `(ceil(numel / 2),)`, the earlier of two entries in the upper half, and absmax float32 `(blocks,)`.

    Arguments:
        flat: in float32, bfloat16 or float16, on the CPU.
        values: what each of the 16 codes stands for.
    """
    numel = flat.numel()
    codes = torch.empty(-(-numel // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32)
    table = _table(values)
    step = max(1, PIECE * torch.get_num_threads() // blocksize) * blocksize
    for start in range(0, numel, step):
        piece = flat[start : start + step].float()
        scaled, largest = _scaled(piece, blocksize)
        absmax[start // blocksize :][: largest.numel()] = largest
        found = table.codes(scaled)
        codes[start // 2 :][: found.numel() // 2] = found[::2].bitwise_left_shift(4).bitwise_or_(found[1::2])
    return codes, absmax


class _Table:
    """The codes of entries between -1 and 1.

    An entry's place among the values is the number of bounds that it exceeds. A cell is a function of the entry that never
    falls: the bounds of earlier cells are exceeded, those of later ones are not.
    """

    def __init__(self, values: Tensor) -> None:
        order = torch.argsort(values)
        bounds = (values[order[:-1]] + values[order[1:]]) / 2
        cells = self._cells(bounds).long()
        if cells.unique().numel() < cells.numel():
            raise ValueError(f"two bounds of {values.tolist()} lie in one of {CELLS} cells")
        self.bound = torch.full((CELLS + 2,), float("inf"))
        self.bound[cells] = bounds
        places = (cells[None, :] < torch.arange(CELLS + 2)[:, None]).sum(dim=1)
        places[-1] = len(bounds)  # of what is no number, as in `torch.bucketize`
        self.in_order = torch.equal(order, torch.arange(len(values)))
        self.place = places.to(torch.uint8)
        self.code = order.to(torch.uint8)

    def codes(self, scaled: Tensor) -> Tensor:
        cells = self._cells(scaled)
        exceeds = scaled > torch.index_select(self.bound, 0, cells)
        places = torch.index_select(self.place, 0, cells).add_(exceeds.view(torch.uint8))
        return places if self.in_order else torch.index_select(self.code, 0, places.int())

    @staticmethod
    def _cells(scaled: Tensor) -> Tensor:
        half = CELLS // 2
        return (scaled * half).add_(half).nan_to_num_(nan=CELLS + 1).int()


@lru_cache(maxsize=4)
def _table(values: tuple[float, ...]) -> _Table:
    return _Table(torch.tensor(values))


def _scaled(piece: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Entries between -1 and 1, with a zero behind an odd number of them, and the absmax of the blocks."""
    rest = piece.numel() % blocksize
    blocks = piece[: piece.numel() - rest].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    if rest:
        last = piece[-rest:]
        largest = last.abs().max().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, (last / largest).clamp_(-1, 1)])
    return (torch.nn.functional.pad(scaled, (0, 1)) if scaled.numel() % 2 else scaled), absmax
