"""A pretended accelerator on a machine that has none: tensors without values that say they lie on another device.

torch's fake tensors refuse what an accelerator refuses (operands on two devices) and what makes a program wait for one (reading a
value: `.item()`, `.tolist()`, a boolean, a shape that depends on values). Backward runs too, because the device is torch's
private-use one, registered from Python. What a copy to the CPU would wait for, `Pretended` refuses itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"


class _Backend(backend_registration._DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    # Where random numbers are drawn on the CPU, torch puts the state of every device back afterwards.

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        pass


@functools.cache
def device() -> torch.device:
    """The device, registered when it is first asked for: once a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    return torch.device(NAME, 0)


class WaitsForTheDevice(AssertionError):
    """A step reads a value that the device has not computed yet."""


class _NoCopyBack(TorchDispatchMode):
    """Above the fake tensors: a copy from the device to the CPU waits for it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _COPIES and isinstance(result, Tensor) and result.device.type == "cpu":
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            if isinstance(source, Tensor) and source.device.type == NAME:
                raise WaitsForTheDevice(f"a tensor {tuple(source.shape)} is copied to the CPU")
        return result


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Pretended:
    """`moved(model)`, then steps of it inside `watched()`."""

    def __init__(self) -> None:
        device()
        self.mode = FakeTensorMode()

    def moved(self, model: nn.Module) -> nn.Module:
        """The same model with its parameters and buffers on the device; a tensor that is neither stays on the CPU."""
        known: dict[Any, Any] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if id(tensor) not in known:
                            known[id(tensor)] = (self._moved(tensor), tensor)
                        held[name] = known[id(tensor)][0]
        return model

    def _moved(self, tensor: Tensor) -> Tensor:
        fake = self.mode.from_tensor(tensor.detach())
        with torch.no_grad(), self.mode:
            fake = fake.to(device())
            return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with self.mode:
            return torch.zeros(*shape, dtype=dtype, device=device())

    @contextmanager
    def watched(self) -> Iterator[None]:
        with self.mode, _NoCopyBack():
            yield
