"""Every rank keeps every parameter: the ranks of a node read a part each, and give it to one another."""

from __future__ import annotations

import socket
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_subspace.pages import zeros_in_pages
from dist_subspace.placement.collectives import broadcast_object, gather_objects, message_device, world
from dist_subspace.placement.protocol import Part

T = TypeVar("T")
SENT = 1 << 26  # bytes that are sent at a time


class Replicas:
    """Whole parameters (`Splitter`): those of one process, or of many that have them alike.

    A rank writes what it reads into the whole; when all have read theirs, each gets the rest from the others in its place, and so
    no rank holds anything twice.
    """

    splits, takes_parts = False, True

    def __init__(self, device: torch.device, alone: bool) -> None:
        """Collective, unless `alone`.

        Arguments:
            device: where the parameters go.
            alone: whether this process loads the model for itself, whatever others do.
        """
        self.device, self._alone = device, alone
        self._held: list[Tensor] = []
        self._ranks, self._group = [world().rank], None
        if alone:
            return
        nodes: dict[str, list[int]] = {}
        for rank, host in enumerate(gather_objects(socket.gethostname())):
            nodes.setdefault(host, []).append(rank)
        self._ranks = next(ranks for ranks in nodes.values() if world().rank in ranks)
        for ranks in nodes.values() if len(nodes) > 1 else ():
            group = dist.new_group(ranks)  # of which every rank makes every one
            self._group = group if ranks == self._ranks else self._group

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Parameter, Part, Tensor]:
        numel, on_cpu = torch.Size(shape).numel(), self.device.type == "cpu"
        # Pages that nobody has written yet take no memory.
        whole = zeros_in_pages(numel, dtype) if on_cpu else torch.zeros(numel, dtype=dtype, device=self.device)
        part = self._part(numel, self._ranks.index(world().rank))
        if len(self._ranks) > 1:
            self._held.append(whole)
        return nn.Parameter(whole.view(shape), requires_grad=False), part, whole[part.start : part.stop]

    def place(self, parameter: nn.Parameter) -> None:
        """It is whole already."""

    def summed(self, tensor: Tensor) -> Tensor:
        if len(self._ranks) == 1:
            return tensor
        message = tensor.to(message_device())
        dist.all_reduce(message, group=self._group)
        return message.to(tensor.device)

    def of_first(self, value: T) -> T:
        return value if self._alone else broadcast_object(value)

    def of_all(self, value: T) -> list[T]:
        return [value] if self._alone else gather_objects(value)

    def complete(self) -> None:
        """Collective: every rank of a node sends what it has read to the others, which write it where it belongs."""
        while self._held:
            whole = self._held.pop(0)
            for number, rank in enumerate(self._ranks):
                part = self._part(whole.numel(), number)
                for piece in whole[part.start : part.stop].view(torch.int8).split(SENT):
                    if piece.numel():
                        dist.broadcast(piece, src=rank, group=self._group)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _part(self, numel: int, number: int) -> Part:
        """What the rank of that number on this node reads."""
        length = -(-numel // len(self._ranks))
        start = min(numel, length * number)
        stop = min(numel, start + length)
        return Part(start, stop, stop - start)
