"""Every storage at work on this rank's device: a small matrix is packed, applied forward and backward, and compared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dist_subspace.doctor.findings import STORAGE, Finding
from dist_subspace.doctor.ranks import Ranks, alike, picked

KIND = "storages"
ROWS, COLUMNS, TOKENS = 256, 512, 64
# The most that a packed matrix of normal numbers may be away from the original, relative in the Frobenius norm, by bits of a
# weight: NF4's is 0.09, FP4's 0.14, int8's 0.01, FP8's 0.03.
LOST = {4: 0.25, 8: 0.06, 16: 0.01, 32: 1e-6}
ROUNDED = 0.02  # of a product in 16 bits beside one in 32


def examine(device: str) -> dict[str, dict[str, Any]]:
    """By storage: whether it works, in words what it does not, and the seconds that it took."""
    from dist_subspace.storage import storages

    found = {}
    for name in storages():
        began = time.perf_counter()
        try:
            wrong = try_storage(name, device)
        except Exception as error:  # kernels that are missing or built for another device fail in many ways
            wrong = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
        found[name] = {"wrong": wrong, "seconds": round(time.perf_counter() - began, 4)}
    return found


def try_storage(name: str, device: str) -> str | None:
    """In words what is wrong with a storage's packing, product or gradient on a device; None where they are right."""
    import torch

    from dist_subspace.storage import pack, storage_info

    info = storage_info(name)
    dtype = info.dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=draw).to(device)
    x = torch.randn(TOKENS, COLUMNS, generator=draw).to(device, dtype).requires_grad_()
    upstream = torch.randn(TOKENS, ROWS, generator=draw).to(device, dtype)
    held = pack(weight.to(info.dtype or torch.float32), name)
    dense = held.dense(torch.float32)
    if (lost := _apart(dense, weight)) > LOST[info.bits]:
        return f"the packed matrix is {lost:.2f} away from the original, and at most {LOST[info.bits]} is right"
    y = held(x)
    y.backward(upstream)
    if (off := _apart(y, x.detach().float() @ dense.t())) > ROUNDED:
        return f"the product is {off:.3f} away from that of the unpacked matrix"
    if x.grad is None or (off := _apart(x.grad, upstream.float() @ dense)) > ROUNDED:
        return f"the gradient is {off:.3f} away from that of the unpacked matrix"
    return None


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    yield "pack, forward, backward", picked(ranks.of(KIND), _text)


def judge(ranks: Ranks) -> Iterator[Finding]:
    wanted = {rank: facts.get("storage") for rank, facts in ranks.of("configuration").items()}
    for facts, places in alike(picked(ranks.of(KIND), lambda found: {n: f["wrong"] for n, f in found.items()})):
        for name, wrong in facts.items():
            if wrong is None:
                continue
            chosen = wanted.get(places[0])
            yield Finding(
                KIND,
                "pack, forward, backward",
                tuple(places),
                f"storage {name} does not work on the device: {wrong}",
                "use the bitsandbytes and torch that are built for this device"
                + (", or another model.storage" if chosen == name else f", or do not use model.storage {name}"),
                STORAGE,
                breaks=chosen is None or chosen == name,
            )


def _apart(one: Any, other: Any) -> float:
    """The difference of two tensors beside the second, in the Frobenius norm; NaN counts as endless."""
    away = float((one.detach().float() - other.float()).norm() / other.float().norm())
    return away if away == away else float("inf")


def _text(found: dict[str, dict[str, Any]]) -> str:
    wrong = [name for name, facts in found.items() if facts["wrong"] is not None]
    right = [name for name in found if name not in wrong]
    return f"{', '.join(right) or 'none'} work" + (f"; {', '.join(wrong)} do not" if wrong else "")
