"""Activations that a backward will read, kept in the computer's memory until it does (`training.activation_offload`).

With activation checkpointing these are the inputs of the blocks alone. Copies run beside the computation, on a stream of their
own: away from the device as soon as a tensor is there, and back before the backward comes to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dist_subspace.torch_internals import viewed

# Bytes of a tensor below which it stays where it is.
FROM = 1 << 20
# Copies away from the device that may be under way: what is being copied is still held there.
UNDER_WAY = 2
# Tensors that are fetched before the backward asks for them.
AHEAD = 1

Keep = Callable[[], AbstractContextManager[Any]]


def activation_offload(wanted: bool, device: torch.device, notice: Callable[[str], None]) -> Keep:
    """What a forward runs in; says so where there is nothing to be done."""
    if wanted and device.type == "cpu":
        notice(
            "training.activation_offload is true, and activations lie in the computer's memory already: nothing is moved"
        )
    return Offload(device) if wanted and device.type != "cpu" else nullcontext


@contextmanager
def kept_here() -> Iterator[None]:
    """Within it tensors are saved as they are: those that the backward begins with."""
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Away:
    """A tensor in the computer's memory, and on its way to and from the device."""

    def __init__(self, number: int, host: Tensor, device: torch.device) -> None:
        self.number, self.host, self.device = number, host, device
        self.copied: Any = None  # the event behind which the host has it
        self.back: Tensor | None = None
        self.ready: Any = None


class Offload:
    """`with offload(): loss = forward()` keeps what autograd saves in the computer's memory.

    Every floating tensor of the device of at least `FROM` bytes goes, but for parameters and views of them. On a device without
    streams (a CPU, in tests) a copy is made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.Stream(device) if device.type != "cpu" else None
        self.moved = 0  # tensors, so far
        self._away: WeakValueDictionary[int, _Away] = WeakValueDictionary()
        self._under_way: deque[tuple[_Away, Tensor]] = deque()

    def __call__(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if not self._goes(tensor):
            return tensor
        self.moved += 1
        away = _Away(self.moved, self._on_host(tensor), self.device)
        self._away[away.number] = away
        if self.stream is None:
            away.host.copy_(tensor)
            return away
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            away.host.copy_(tensor, non_blocking=True)
            away.copied = self.stream.record_event()
        self._under_way.append((away, tensor))  # held until the copy is made
        while len(self._under_way) > UNDER_WAY:
            first, _ = self._under_way[0]
            first.copied.synchronize()
            self._under_way.popleft()
        return away

    def _goes(self, tensor: Tensor) -> bool:
        of_parameter = isinstance(tensor, nn.Parameter) or isinstance(viewed(tensor), nn.Parameter)
        large = tensor.numel() * tensor.element_size() >= FROM
        return tensor.is_floating_point() and tensor.device == self.device and large and not of_parameter

    def _on_host(self, tensor: Tensor) -> Tensor:
        pinned = self.stream is not None
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self.stream is None:
            return saved.host.clone()  # type: ignore[no-any-return]
        while self._under_way:  # what is done from here on, in memory that is free then, comes behind these copies
            torch.accelerator.current_stream(self.device).wait_event(self._under_way.popleft()[0].copied)
        self._fetch(saved)
        for number in range(saved.number - 1, saved.number - 1 - AHEAD, -1):
            before = self._away.get(number)
            if before is not None:
                self._fetch(before)
        torch.accelerator.current_stream(self.device).wait_event(saved.ready)
        back, saved.back = saved.back, None
        return back  # type: ignore[no-any-return]

    def _fetch(self, away: _Away) -> None:
        """Begin to bring it back; its memory is the computation's, which waits for the copy before it reads."""
        if away.back is not None:
            return
        away.back = torch.empty(away.host.shape, dtype=away.host.dtype, device=self.device)
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            away.back.copy_(away.host, non_blocking=True)
            away.ready = self.stream.record_event()
