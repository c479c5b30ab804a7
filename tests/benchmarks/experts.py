"""A layer of experts, forward and backward: one product an expert against several in one call, and transformers' own loop.

    python -m tests.benchmarks.experts [--experts 128] [--tokens 512] [--top 8] [--hidden 2048] [--inner 768]
                                       [--storages nf4 int8 bf16] [--dtypes bfloat16 float32] [--at-once 8] [--device cpu]

Seconds are medians of `--repeats` in turns; the other figure is the most bytes of tensors that one pass makes and that live at
once, those inside an operator apart (memory.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dist_subspace.storage import FrozenStack, grouped, pack_stack
from tests.benchmarks.memory import peak_bytes

MIB = 2**20


def counts_of(tokens: int, top: int, experts: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=experts).tolist()


def layer(enter: FrozenStack, leave: FrozenStack, x: Tensor, counts: list[int]) -> None:
    """Gate, up and down, and the gradient of x."""
    gate, up = enter(x, counts).chunk(2, dim=-1)
    leave(functional.silu(gate) * up, counts).sum().backward()


def eager(enter: Tensor, leave: Tensor, x: Tensor, counts: list[int]) -> None:
    """The same as transformers' classes do it, with matrices that are whole."""
    made = []
    for rows, first, second in zip(x.split(counts), enter, leave, strict=True):
        if len(rows):
            gate, up = functional.linear(rows, first).chunk(2, dim=-1)
            made.append(functional.linear(functional.silu(gate) * up, second))
    torch.cat(made).sum().backward()


def timed(ways: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def measure(given: argparse.Namespace, storage: str, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(1)
    shapes = (2 * given.inner, given.hidden), (given.hidden, given.inner)
    weights = [torch.empty(given.experts, *shape).normal_(std=0.02, generator=generator).to(dtype) for shape in shapes]
    place = torch.device(given.device)
    enter, leave = (pack_stack(weight, storage, device=place) for weight in weights)
    enter.at_once = leave.at_once = given.at_once
    counts = counts_of(given.tokens, given.top, given.experts)
    x = torch.randn(sum(counts), given.hidden, generator=generator).to(place, dtype).requires_grad_()
    whole = [weight.to(place) for weight in weights]

    def forced(together: bool) -> Callable[[], None]:
        def way() -> None:
            grouped.has_grouped_kernel = lambda device, kind: together
            layer(enter, leave, x, counts)

        return way

    ways: dict[str, Callable[[], None]] = {"one by one": forced(False), "in groups": forced(True)}
    ways["transformers"] = lambda: eager(*whole, x, counts)
    seconds = timed(ways, given.repeats, given.device)
    peaks = {name: peak_bytes(way) / MIB for name, way in ways.items()}
    cells = "".join(f"{seconds[name]:>14.3f} s{peaks[name]:>8.0f} MiB" for name in ways)
    return f"{storage:<6}{str(dtype).removeprefix('torch.'):<10}{sum(map(bool, counts)):>6} hit{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"experts": 128, "tokens": 512, "top": 8, "hidden": 2048, "inner": 768}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--at-once", type=int, default=grouped.AT_ONCE)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--storages", nargs="*", default=["nf4", "int8", "bf16"])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(f"{'':26}{'one by one':>28}{'in groups':>28}{'transformers':>28}")
    for storage in given.storages:
        for dtype in given.dtypes:
            print(measure(given, storage, getattr(torch, dtype)), flush=True)


if __name__ == "__main__":
    main()
