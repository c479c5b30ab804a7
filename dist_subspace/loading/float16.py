"""Weights that float16 cannot hold: infinite there, and what follows no number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_subspace.errors import UsageError

WIDER = (torch.float32, torch.bfloat16, torch.float64)  # than float16: types whose values it may not hold


class Float16Range:
    """Sees the values of a weight that becomes `dtype`, in any pieces: the same is found of the whole and of its pieces.

    largest: the largest finite magnitude so far, where it matters.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.largest = dtype, 0.0

    def __call__(self, values: Tensor) -> Tensor:
        """The values as they are."""
        if self.dtype == torch.float16 and values.dtype in WIDER and values.numel():
            magnitudes = values.abs()
            largest = float(magnitudes.amax())
            if not largest < float("inf"):  # infinite, or no number: the others count all the same
                largest = float(magnitudes.nan_to_num(0.0, posinf=0.0).amax())
            self.largest = max(self.largest, largest)
        return values

    @property
    def overflows(self) -> bool:
        return self.largest > torch.finfo(torch.float16).max


class TooLarge(UsageError):
    """A weight above 65,504, where float16 ends. number: how many weights were read before it, alike on every rank."""

    def __init__(self, folder: str, name: str, largest: float, number: int) -> None:
        self.folder, self.name, self.largest, self.number = folder, name, largest, number
        super().__init__(
            f"model.path is {folder!r}, whose {name} has values up to {largest:,.0f}, which float16 cannot hold; accepted for "
            "this model: model.dtype bfloat16 or float32"
        )

    def __reduce__(self) -> tuple[type[TooLarge], tuple[str, str, float, int]]:
        return TooLarge, (self.folder, self.name, self.largest, self.number)


def earliest(found: Iterable[TooLarge | None]) -> TooLarge | None:
    """What all ranks say of what each has found in its own part: the weight that comes first, and its largest value."""
    refused = [one for one in found if one is not None]
    if not refused:
        return None
    number = min(one.number for one in refused)
    return max((one for one in refused if one.number == number), key=lambda one: one.largest)
