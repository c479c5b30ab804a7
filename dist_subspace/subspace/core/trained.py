"""What owns trained parameters, whatever it stands on: a method's parts, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

# A context in which the given parameters are whole; collective where they are split over ranks.
Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class TrainedModule(nn.Module):
    """A module with trained parameters of its own. They are float32, whatever the type of the computation.

    enabled: whether it acts. With every one of them off the model computes what its frozen base computes.
    """

    enabled: bool

    def trainables(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their own names."""
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained tensors as the adapter's file holds them, by suffix (`lora_A.weight`)."""
        return {name: p.detach() for name, p in self.trainables().items()}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `file_tensors`; parameters are whole."""
        for name, parameter in self.trainables().items():
            parameter.data.copy_(tensors[name])


class TrainedBeside(TrainedModule):
    """What is trained beside the method: a module in full, the rows of new tokens."""

    def plain_module(self) -> nn.Module | None:
        """What stands in its place in the merged model; None where that has no such module."""
        raise NotImplementedError
