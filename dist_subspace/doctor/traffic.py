"""A real all-reduce and all-gather, over the run's own group and between each pair of nodes, with bandwidth and latency."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from dist_subspace.doctor.findings import REMARK, UNREACHED, Finding
from dist_subspace.doctor.ranks import Ranks

KIND = "traffic"
SMALL = 1 << 20  # bytes of the first try
LARGE = {"gloo": 16 << 20, "nccl": 256 << 20}  # bytes where the first try was quick
QUICK = 0.05  # seconds
TIMES, SHORT_TIMES = 3, 20
SLOWER = 4.0  # times slower than most pairs is worth a remark
ONE_AT_A_TIME = 8  # nodes; of more, pairs that share no node are measured at the same moment


def measure(plan: dict[str, Any], rank: int, store: Any, limit: float) -> dict[str, Any]:
    """Collective over `plan["ranks"]`: make their group, and time the collectives.

    Arguments:
        plan: "ranks" of the group in order, "backend", "nodes" the first rank of each node, "prefix" of the keys in the store;
        limit: seconds for each collective.

    Returns:
        "group" and each of "pairs" (by "1-2"): of all_reduce and all_gather the bytes, seconds, bytes a second of a rank's
        card, and seconds of latency; "error" where one came to no end, or to a wrong one.
    """
    import torch
    import torch.distributed as dist

    members, device = plan["ranks"], torch.device("cpu")
    if plan["backend"] == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(
        plan["backend"],
        store=dist.PrefixStore(plan["prefix"], store) if store is not None else dist.HashStore(),
        rank=members.index(rank),
        world_size=len(members),
        timeout=timedelta(seconds=limit),
    )
    found: dict[str, Any] = {"backend": plan["backend"], "size": len(members), "pairs": {}}
    found["group"] = _both(None, len(members), device, plan["backend"])
    for together in rounds(plan["nodes"]):
        groups = {
            pair: dist.new_group([members.index(node) for node in pair], timedelta(seconds=limit)) for pair in together
        }
        for pair, group in groups.items():
            if rank in pair:
                found["pairs"]["-".join(map(str, pair))] = _both(group, 2, device, plan["backend"])
        dist.barrier()
    return found


def rounds(nodes: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair of nodes once, in rounds of pairs that are measured together: one, or of many nodes all that share no node."""
    if len(nodes) <= ONE_AT_A_TIME:
        yield from ([(one, other)] for place, one in enumerate(nodes) for other in nodes[place + 1 :])
        return
    circle: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _both(group: Any, size: int, device: Any, backend: str) -> dict[str, Any]:
    """Collective over the group: both operations, each right and timed."""
    import torch
    import torch.distributed as dist

    own = float(dist.get_rank(group) + 1)

    def reduce(count: int) -> Callable[[], None]:
        tensor = torch.full((count,), own, device=device)
        return lambda: dist.all_reduce(tensor, group=group)  # type: ignore[no-any-return]

    def gather(count: int) -> Callable[[], None]:
        tensor = torch.full((count,), own, device=device)
        pieces = [torch.empty_like(tensor) for _ in range(size)]
        return lambda: dist.all_gather(pieces, tensor, group=group)  # type: ignore[no-any-return]

    if (wrong := _wrong(group, size, own, device)) is not None:
        return {"error": wrong}
    share = (size - 1) / size  # of the bytes that cross a card, as in NCCL's own tests: of an all-reduce twice
    return {
        "all_reduce": _timed(reduce, 1, 2 * share, group, device, backend),
        "all_gather": _timed(gather, size, share, group, device, backend),
    }


def _wrong(group: Any, size: int, own: float, device: Any) -> str | None:
    """In words what a collective gave that it should not; None where both are right."""
    import torch
    import torch.distributed as dist

    tensor = torch.full((1000,), own, device=device)
    pieces = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(pieces, tensor, group=group)
    dist.all_reduce(tensor, group=group)
    if not all(bool((piece == place + 1).all()) for place, piece in enumerate(pieces)):
        return "an all-gather gave other numbers than the ranks had"
    if not bool((tensor == size * (size + 1) / 2).all()):
        return f"an all-reduce gave {float(tensor[0])}, and the sum is {size * (size + 1) / 2}"
    return None


def _timed(
    make: Callable[[int], Callable[[], None]], pieces: int, crossing: float, group: Any, device: Any, backend: str
) -> dict[str, float]:
    """Collective over the group: latency of four bytes, and what a card carries of many; all ranks choose the same size."""
    import torch
    import torch.distributed as dist

    def seconds(call: Callable[[], None], times: int) -> float:
        spent = []
        for _ in range(times):
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)

    call = make(1)
    call()  # the first one makes the connections
    latency, size = seconds(call, SHORT_TIMES), SMALL
    first = seconds(make(size // 4 // pieces), 2)
    slowest = torch.tensor([first], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    if float(slowest) < QUICK:
        size = LARGE[backend]
    spent = seconds(make(size // 4 // pieces), TIMES)
    return {"bytes": size, "seconds": spent, "bandwidth": crossing * size / spent, "latency": latency}


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    if not found:
        return
    facts = next(iter(found.values()))
    title = f"{facts['backend']}, {facts['size']} rank{'s' if facts['size'] > 1 else ''}"
    for name, operation in (("all-reduce", "all_reduce"), ("all-gather", "all_gather")):
        yield f"{name}, {title}", {rank: _text(facts["group"], operation) for rank in found}
    for pair, measured in _pairs(ranks).items():
        one, other = (ranks.host(int(rank)) for rank in pair.split("-"))
        both = ", ".join(
            f"{name} {_text(measured, key)}"
            for name, key in (("all-reduce", "all_reduce"), ("all-gather", "all_gather"))
        )
        yield f"{one} - {other}", dict.fromkeys(ranks.firsts().values(), both)


def judge(ranks: Ranks) -> Iterator[Finding]:
    for rank, facts in ranks.of(KIND).items():
        for pair, measured in (("its group", facts["group"]), *facts["pairs"].items()):
            if "error" in measured:
                what = (
                    f"a collective of {pair if pair == 'its group' else f'ranks {pair}'} is wrong: {measured['error']}"
                )
                yield Finding(
                    KIND, "all-reduce", (rank,), what, "look for a card or a device that is damaged", UNREACHED
                )
    speeds = {pair: found["all_reduce"]["bandwidth"] for pair, found in _pairs(ranks).items() if "all_reduce" in found}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    for pair, speed in speeds.items():
        if len(speeds) > 2 and speed * SLOWER < usual:
            one, other = (int(rank) for rank in pair.split("-"))
            what = f"between {ranks.host(one)} and {ranks.host(other)} go {_rate(speed)}, and {_rate(usual)} between most nodes"
            do = "look at the cable, the switch's port and the card (ethtool, ibstat): all nodes wait for the slowest link"
            yield Finding(
                KIND, f"{ranks.host(one)} - {ranks.host(other)}", (one, other), what, do, REMARK, breaks=False
            )


def _pairs(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What was measured of each pair, as its first member says; in the order of the nodes."""
    found = {pair: measured for facts in reversed(ranks.of(KIND).values()) for pair, measured in facts["pairs"].items()}
    return dict(sorted(found.items(), key=lambda item: [int(rank) for rank in item[0].split("-")]))


def _text(measured: dict[str, Any], operation: str) -> str:
    if "error" in measured:
        return "wrong"
    found = measured[operation]
    if not found["bandwidth"]:
        return "right"  # of one rank, nothing crosses a card
    return f"{_rate(found['bandwidth'])}, {_duration(found['latency'])}"


def _rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s" if value >= 1e9 else f"{value / 1e6:.1f} MB/s"


def _duration(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
