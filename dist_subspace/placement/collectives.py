"""How ranks decide alike: every function here that says "collective" must be called by all ranks.

Without a process group each of them works for one rank, so callers never branch on "is this distributed".
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_subspace.errors import UsageError
from dist_subspace.launchers import NODE_RANK
from dist_subspace.placement.peer import Peer
from dist_subspace.placement.peers import Peers
from dist_subspace.stopping import STOP, Interrupted

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, and its number on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class PeerFailed(RuntimeError):
    """Another rank failed; this one stops with it instead of waiting in a collective."""


class PeerGone(PeerFailed):
    """Another rank's process has ended without a word: killed, as a rule."""

    def __init__(self, gone: list[Peer]) -> None:
        self.gone = gone
        super().__init__(f"{', '.join(map(str, gone))} is gone")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> World:
    local = int(os.environ.get(NODE_RANK, os.environ.get("LOCAL_RANK", 0)))
    if not is_distributed():
        return World(local_rank=local)
    return World(dist.get_rank(), dist.get_world_size(), local)


def barrier() -> None:
    """Collective: wait until every rank is here."""
    if is_distributed():
        dist.barrier()


_BETWEEN_LOOKS = 0.05  # seconds


def all_here(what: str, patience: float) -> None:
    """Collective, but a rank that is alone says so instead of waiting for ever: wait until every rank calls `what`.

    Ranks sign in the process group's key-value store. Whoever sees all names, or has waited `patience` seconds, tries to
    decide that the meeting is on or off; the store keeps the first decision, so that nobody goes on alone. Ranks that
    come to a meeting that is off wait at the next one.

    Raises:
        UsageError: the other ranks have not come; names those that have and those that have not.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return
    store, rank, size = _store(), dist.get_rank(), dist.get_world_size()
    while True:
        meeting = f"dist_subspace/meeting/{store.add(f'dist_subspace/meetings/{rank}', 1)}"
        store.set(f"{meeting}/{rank}", what)
        decision, absent = _decided(store, meeting, size, patience)
        if decision == "on":
            return
        if absent:
            here = [other for other in range(size) if other not in absent]
            raise UsageError(
                f"{what} was called by rank {_listed(here)} of {size}, and in {patience:g} seconds not by rank "
                f"{_listed(absent)}: every rank must call it, because each holds a part of the model"
            )


def _decided(store: Any, meeting: str, size: int, patience: float) -> tuple[str, list[int]]:
    """`on` or `off`, and the ranks that this rank has waited for in vain (none where others called the meeting off)."""
    deadline = time.monotonic() + patience
    while True:
        absent = [rank for rank in range(size) if not store.check([f"{meeting}/{rank}"])]
        late = time.monotonic() > deadline
        if not absent or late:
            wish = "off" if absent else "on"
            decision = store.compare_set(f"{meeting}/decision", "", wish).decode()
            return decision, absent if decision == "off" and late else []
        if store.check([f"{meeting}/decision"]):
            return store.get(f"{meeting}/decision").decode(), []
        time.sleep(_BETWEEN_LOOKS)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _store() -> Any:
    return dist.group.WORLD.get_group_store()  # type: ignore[union-attr]


_PEER_LOOKS = 3.0  # seconds between two looks at the others
_HEARING = 5.0  # seconds in which the others hear what a rank tells them
_MOMENT = 3.0  # seconds in which a process whose connections broke has ended
_peers: Peers | None = None
_meetings = 0
_store_is_lost = False


@contextmanager
def known_peers(peers: Peers | None) -> Iterator[None]:
    """Within the block, who waits for another rank (`meet`) also looks whether its process lives."""
    global _peers, _store_is_lost
    before, _peers, _store_is_lost = _peers, peers, False
    try:
        yield
    finally:
        _peers = before


def meet() -> None:
    """Collective: wait until every rank is here, for hours if need be: in no collective, whose timeout would end the run.

    Raises:
        PeerFailed: a rank that is waited for is gone, or one has said why the run ends.
    """
    global _meetings, _store_is_lost
    if not is_distributed() or dist.get_world_size() == 1 or _store_is_lost:
        return
    store, _meetings = _store(), _meetings + 1
    key, began = f"dist_subspace/meet/{_meetings}", time.monotonic()
    looked = began
    try:
        if store.add(key, 1) == dist.get_world_size():
            store.set(f"{key}/all", "1")
            store.delete_key(f"dist_subspace/meet/{_meetings - 1}")  # nobody waits there any more
            store.delete_key(f"dist_subspace/meet/{_meetings - 1}/all")
        while not store.check([f"{key}/all"]):
            if _peers is not None and _peers.told is not None:
                raise PeerFailed("another rank has said why the run ends")
            if _peers is not None and time.monotonic() - looked > _PEER_LOOKS:
                looked = time.monotonic()
                _refuse_gone(_peers.gone(), lambda: bool(store.check([f"{key}/all"])))
            _wait_a_little(began)
    except dist.DistNetworkError:  # the store has ended with its host, a rank or the launcher
        gone = _peers.gone_within(_MOMENT) if _peers is not None and not _store_is_lost else []
        _store_is_lost = True
        if gone:
            raise PeerGone(gone) from None


def _wait_a_little(began: float) -> None:
    """Between two questions to the store, ever longer. Its own `wait` writes lines of C++ to the screen when it times out."""
    time.sleep(min(0.5, max(0.001, 0.1 * (time.monotonic() - began))))


def _refuse_gone(gone: list[Peer], all_here: Callable[[], bool]) -> None:
    if gone and not all_here():  # one that came to the meeting may have left since
        raise PeerGone(gone)


def may_speak() -> bool:
    """Local, true once in a run: whether this rank is the first that wants to say why the run ends. A fault that all ranks
    have alike is said by one of them."""
    if world().size > 1:
        with suppress(RuntimeError):  # the store may have ended with the rank that held it
            return int(_store().add(f"{_told()}/speaker", 1)) == 1
    return True


def tell_peers(status: int = 1, log: str = "", sentence: str = "") -> None:
    """Local: this rank has said why it failed, in this sentence, and leaves with this exit status; `log`: what it said before."""
    if _peers is not None:
        _peers.tell(status, _HEARING, log, sentence)
    elif world().size > 1:
        with suppress(RuntimeError):
            _store().set(_told(), str(status))


def wait_until_told(patience: float) -> int | None:
    """Local, after `PeerFailed`: wait until the rank at fault has called `tell_peers`, or `patience` seconds; its exit status, or
    None. A launcher ends all ranks with the first one that leaves, and those at fault may still have something to close before
    they speak."""
    if world().size == 1:
        return None
    store, began = _store(), time.monotonic()
    with suppress(RuntimeError):
        while (_peers is None or _peers.told is None) and not store.check([_told()]):
            if time.monotonic() - began > patience:
                return None
            _wait_a_little(began)
        return int(store.get(_told())) if _peers is None or _peers.told is None else _peers.told
    return None if _peers is None else _peers.told


def _told() -> str:
    return "dist_subspace/told" if _peers is None else f"{_peers.prefix}/told"


def gather_objects(value: T) -> list[T]:
    """Collective: every rank's value, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T, source: int = 0) -> T:
    """Collective: the source rank's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Collective: whether the flag is set on at least one rank."""
    return any(gather_objects(bool(flag)))


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Collective at its end: if the block raised on one rank, every rank raises.

    The block itself must hold no collective: a rank that has raised would not take part in it. The failing rank
    re-raises its own error; the others raise the same kind, so that all leave with the same exit status (`is_everyones`). A
    refusal that is not true on every host names the one where it is. A block may take hours on one rank. Where the run may be
    left (`Stop.leavable`), a stop interrupts it, and all ranks raise `Interrupted`.
    """
    error: BaseException | None = None
    try:
        with STOP.interruptible():
            yield
    except (Exception, Interrupted) as caught:
        error = caught
    meet()
    reports = gather_objects(Report(socket.gethostname(), None if error is None else (_kind(error), f"{error}")))
    if isinstance(error, UsageError):
        error.args = (_with_host(f"{error}", world().rank, reports),)
    if error is None:
        error = _of_others(what, reports)
    if error is not None:
        raise of_everyone(error)


_EVERYONES = "is_everyones"


@dataclass(frozen=True)
class Report:
    """How a rank came to the end of an agreement; failed: the kind of its error and the message."""

    host: str
    failed: tuple[type[UsageError] | type[Interrupted] | None, str] | None


def of_everyone(error: E) -> E:
    """The error, marked as one that every rank raises."""
    error.__dict__[_EVERYONES] = True
    return error


def is_everyones(error: BaseException) -> bool:
    """Whether every rank has raised this error, or its counterpart, at the end of one `agreed`."""
    return bool(error.__dict__.get(_EVERYONES))


def _of_others(what: str, reports: list[Report]) -> BaseException | None:
    for rank, report in enumerate(reports):
        if report.failed is not None:
            kind, message = report.failed
            if kind is None:
                return PeerFailed(f"{what} failed on rank {rank}: {message}")
            return kind(_with_host(message, rank, reports) if kind is UsageError else message)
    return None


def _with_host(message: str, rank: int, reports: list[Report]) -> str:
    """The message, and where it is true, if that is not on every host."""
    hosts, failed = {report.host for report in reports}, {report.host for report in reports if report.failed}
    return message if failed == hosts else f"on {reports[rank].host} (rank {rank}): {message}"


def _kind(error: BaseException) -> type[UsageError] | type[Interrupted] | None:
    """What the other ranks raise; None: that a peer failed. A `ValueError` of a library, such as one of a damaged JSON, is a
    failure, and not a refusal."""
    if isinstance(error, Interrupted):
        return Interrupted
    return UsageError if isinstance(error, UsageError) else None


def refuse_unlike(facts: Mapping[str, Any]) -> None:
    """Collective: what every rank has found out for itself is what rank 0 has found; a key that one of two lacks is not compared.

    Raises:
        UsageError: on every rank; names a rank, its host where there are several, a key and both values.
    """
    (first_host, first), *others = gather_objects((socket.gethostname(), dict(facts)))
    for rank, (host, other_facts) in enumerate(others, start=1):
        for key, value in other_facts.items():
            if key in first and first[key] != value:
                here, there = (f" on {first_host}", f" on {host}") if host != first_host else ("", "")
                raise of_everyone(
                    UsageError(
                        f"rank {rank}{there} has another {key} than rank 0{here}: {value!r}, and not {first[key]!r}; accepted: "
                        "the same files and the same command for every rank"
                    )
                )


def on_main(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Collective: run the function on rank 0 alone; every rank gets its result, or its error."""
    result = None
    with agreed(getattr(function, "__name__", "a step on rank 0")):
        if world().is_main:
            result = function(*args, **kwargs)
    return broadcast_object(result)  # type: ignore[return-value]


def once_per_node(function: Callable[..., T], *args: Any, **kwargs: Any) -> None:
    """Collective: run the function on the first rank of each node (it leaves files behind); an error is everyone's."""
    with agreed(getattr(function, "__name__", "a step of each node")):
        if world().local_rank == 0:
            function(*args, **kwargs)


def sum_over_ranks(values: list[float], device: torch.device | None = None) -> list[float]:
    """Collective: each number summed over the ranks, in float64, in one small all-reduce."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device or message_device())
    dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def summed_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Collective: the sum of the ranks' tensors, which are of one shape, on the tensor's own device."""
    if not is_distributed():
        return tensor
    message = tensor.to(message_device())
    dist.all_reduce(message)
    return message.to(tensor.device)


def largest_over_ranks(values: list[float], device: torch.device | None = None) -> list[float]:
    """Collective: the largest of each number over the ranks, float64, in one small all-reduce."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device or message_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(v) for v in tensor.tolist()]


def max_over_ranks(value: float) -> float:
    """Collective: the largest of the ranks' numbers."""
    return max(gather_objects(value))


def broadcast_tensors(tensors: dict[str, torch.Tensor] | None, source: int = 0) -> dict[str, torch.Tensor]:
    """Collective: the source rank's tensors on every rank, on the CPU; one at a time, so that no rank holds two copies of
    all."""
    if not is_distributed():
        return dict(tensors or {})
    described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} if tensors is not None else None
    received = {}
    for name, (shape, dtype) in (broadcast_object(described, source) or {}).items():
        tensor = tensors[name] if tensors is not None else torch.empty(shape, dtype=dtype)
        message = tensor.to(message_device()).contiguous()  # gloo sends the memory as it lies
        dist.broadcast(message, src=source)
        received[name] = message.to("cpu")
    return received


def message_device() -> torch.device:
    """NCCL sends what lies on the GPU, gloo what lies on the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
