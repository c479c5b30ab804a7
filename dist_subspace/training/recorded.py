"""What a model does between its head and its logits, recorded once and done again to pieces.

Gemma caps logits by a tanh, Granite divides them, Cohere multiplies them; a family of tomorrow does it under another name. So no
name is asked for: torch reports every function that takes the head's result or what was made of it (`TorchFunctionMode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions of one tensor and numbers that treat each entry by itself.
# fmt: off
BY_ENTRY = {
    "mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__rdiv__",
    "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "neg", "__neg__", "tanh", "clamp", "clip",
    "float", "to", "type", "contiguous", "clone",
}
# fmt: on
# What says something about a tensor and makes none of it.
_ASKED = {
    "__get__",
    "size",
    "dim",
    "numel",
    "is_floating_point",
    "element_size",
    "stride",
    "get_device",
    "is_contiguous",
}


@dataclass(frozen=True)
class Place:
    """In recorded arguments: the tensor that was made in that step, the head's result being number 0."""

    number: int


@dataclass(frozen=True)
class Step:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, made: list[Tensor]) -> Tensor:
        arguments = [made[a.number] if isinstance(a, Place) else a for a in self.arguments]
        result: Tensor = self.function(*arguments, **self.options)
        return result


@dataclass(frozen=True)
class Program:
    """From the head's result to the model's logits, of any number of rows."""

    steps: tuple[Step, ...] = ()

    def __call__(self, result: Tensor) -> Tensor:
        made = [result]
        for step in self.steps:
            made.append(step(made))
        return made[-1]


class Recorder(TorchFunctionMode):
    """Within it, after `begin(result)`, each function of the head's result is noted, until something is done that one row's
    logits do not say.

    unknown: the name of what cannot be done again, and therefore of why there is no program; None so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown: str | None = None
        self._made: list[Tensor] = []
        self._steps: list[Step] = []
        self._ended = False

    def begin(self, result: Tensor) -> None:
        if self._made:
            self.unknown = "a second call of the head"
        self._made.append(result)

    def program(self, logits: Tensor) -> Program | None:
        """What made the model's logits of the head's result; None where that was not seen."""
        number = self._number(logits)
        return None if number is None or self.unknown is not None else Program(tuple(self._steps[:number]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if self._made and any(self._number(value) is not None for value in _flat((args, options))):
            self._note(func, args, options, result)
        return result

    def end(self) -> None:
        """What happens from here on is not noted."""
        self._ended = True

    def _note(self, function: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        if name in _ASKED or self._ended:
            return
        if name == "detach":  # what engines hang on modules hands results on so
            self._steps.append(Step(_same, (Place(self._number(args[0]) or 0),)))
            self._made.append(result)
            return
        plain = not any(isinstance(value, Tensor | list | tuple) for value in options.values())
        own = [isinstance(a, Tensor) and self._number(a) is None for a in args]
        if name not in BY_ENTRY or not plain or any(own) or not isinstance(result, Tensor):
            self.unknown = self.unknown or name or str(function)
            return
        numbers = [self._number(a) for a in args]
        arguments = tuple(a if n is None else Place(n) for a, n in zip(args, numbers))
        self._steps.append(Step(function, arguments, dict(options)))
        self._made.append(result)

    def _number(self, value: Any) -> int | None:
        """Which of the tensors made so far it is; the latest, where a function gave back what it was given."""
        if not isinstance(value, Tensor):
            return None
        return next((n for n in range(len(self._made) - 1, -1, -1) if self._made[n] is value), None)


def _same(made: Tensor) -> Tensor:
    return made


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree as far as rounding lets them: a product of other shapes adds up in another order."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 3e-2
    scale = float(expected.detach().float().abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
