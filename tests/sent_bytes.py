"""What this rank sends in collectives, seen where every one of them passes: at torch's own `c10d` operators, whoever calls them.

    with recorded() as messages:
        step()
    assert sum(message.sent for message in messages) == ...

Bytes are those of a ring, which gloo and NCCL use for large messages: to gather a payload over n ranks each sends (n - 1) / n of
it, to sum and scatter it as much, to sum it on all ranks twice that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# operator -> (kind, which argument holds the whole payload, how often a ring carries it)
_OPERATORS = {
    "_allgather_base_": ("gather", 0, 1),
    "allgather_": ("gather", 0, 1),
    "allgather_coalesced_": ("gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("gather", 0, 1),
    "_reduce_scatter_base_": ("scatter", 1, 1),
    "reduce_scatter_": ("scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("scatter", 1, 1),
    "allreduce_": ("sum", 0, 2),
    "allreduce_coalesced_": ("sum", 0, 2),
    "broadcast_": ("broadcast", 0, 1),
    "reduce_": ("reduce", 0, 1),
    "gather_": ("to one", 1, 1),
    "alltoall_base_": ("exchange", 1, 1),  # the payload is what this rank has for all
}
_SILENT = {"barrier", "monitored_barrier_"}


@dataclass(frozen=True)
class Message:
    """One collective. payload: bytes of the whole; ranks: that take part; times: a ring carries it; own: bytes of an exchange
    that this rank keeps."""

    kind: str
    payload: int
    dtype: torch.dtype
    ranks: tuple[int, ...]
    times: int
    own: int = 0

    @property
    def sent(self) -> int:
        """Bytes that each rank sends; of an exchange, where each has its own payload, what this one sends."""
        if self.kind == "exchange":
            return self.payload - self.own
        return self.times * self.payload * (len(self.ranks) - 1) // len(self.ranks)

    def crosses(self, ranks_per_node: int) -> bool:
        """Whether its ranks are on several nodes."""
        return len({rank // ranks_per_node for rank in self.ranks}) > 1


@contextmanager
def recorded() -> Iterator[list[Message]]:
    """Every collective of this rank within the block, in order."""
    messages: list[Message] = []
    with _Recording(messages):
        yield messages


class _Recording(TorchDispatchMode):
    def __init__(self, messages: list[Message]) -> None:
        super().__init__()
        self.messages = messages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func.overloadpacket.__name__.rpartition(".")[2], args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        kind, place, times = _OPERATORS[name]  # a KeyError: one that nobody has counted yet
        tensors = list(_tensors(args[place]))
        group = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        payload = sum(t.numel() * t.element_size() for t in tensors)
        payload *= len(ranks) if kind == "to one" else 1
        own = _kept_of_an_exchange(args, ranks) if kind == "exchange" else 0
        self.messages.append(Message(kind, payload, tensors[0].dtype, ranks, times, own))


def _kept_of_an_exchange(args: tuple[Any, ...], ranks: tuple[int, ...]) -> int:
    given, sizes = args[1], args[4]
    return int(sizes[ranks.index(dist.get_rank())] * given[:1].numel() * given.element_size())


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for inner in argument:
            yield from _tensors(inner)
