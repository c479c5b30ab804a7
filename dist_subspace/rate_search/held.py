"""Where the training of one rate stands, kept in memory, and put back into an engine that has trained at another since.

The frozen base is nobody's state: what is kept is what a checkpoint holds, the trained parameters' masters and moments, and what
the method's schedule has decided. Rank 0 keeps the tensors, and sends them when they are put back.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_subspace.advancing import prepare_step
from dist_subspace.checkpoint.state import SentInGroups, method_state, restore_schedule, schedule_tensors
from dist_subspace.placement.collectives import broadcast_object, broadcast_tensors, world
from dist_subspace.placement.optimizer_state import MASTER
from dist_subspace.placement.protocol import Engine
from dist_subspace.subspace import attached, named_trainables


@dataclass(frozen=True)
class Held:
    """tensors: by parameter name, as in a checkpoint, on rank 0 alone; sizes: their bytes; buffers: of the parts that the
    method's schedule moves; optimizer_steps: as the optimizer counts; schedule: the method's; scaler: of the loss scale."""

    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    buffers: dict[str, Tensor]
    optimizer_steps: int
    schedule: dict[str, Any]
    scaler: dict[str, float]

    @property
    def bytes(self) -> int:
        """On rank 0."""
        return sum(self.sizes.values())


def hold(engine: Engine, model: nn.Module) -> Held:
    """Collective: what the next `put_back` will find again."""
    tensors = engine.read_state(named_trainables(model)) | schedule_tensors(model)
    sizes = broadcast_object({name: tensor.nbytes for name, tensor in tensors.items()})
    return Held(
        tensors=tensors if world().is_main else {},
        sizes=sizes,
        buffers={name: buffer.detach().to("cpu", copy=True) for name, buffer in _buffers(model).items()},
        optimizer_steps=engine.step_count(),
        schedule=method_state(model),
        scaler=engine.scaler_state(),
    )


def without_steps(held: Held, scaler: Mapping[str, float]) -> Held:
    """The same parameters before the optimizer's first step: moments are zero, and steps are counted from 0.

    Arguments:
        scaler: where the loss scale stood before a first step was made for the moments' sake.
    """
    first = {name for name in held.sizes if name.endswith(f".{MASTER}")}
    return Held(
        tensors={name: tensor for name, tensor in held.tensors.items() if name in first},
        sizes={name: size for name, size in held.sizes.items() if name in first},
        buffers=held.buffers,
        optimizer_steps=0,
        schedule=held.schedule,
        scaler=dict(scaler),
    )


def put_back(held: Held, engine: Engine, model: nn.Module, step: int, max_steps: int) -> None:
    """Collective: the engine goes on from there, after `step` steps of `max_steps`. Its moments exist already."""
    trainables = named_trainables(model)
    tensors = HeldTensors(held, list(trainables))
    engine.drop_gradients()
    engine.write_state(trainables, tensors, held.optimizer_steps)
    engine.restore_scaler(held.scaler)
    known: Mapping[str, Tensor] = ChainMap(held.buffers, tensors)  # type: ignore[arg-type]
    restore_schedule(model, held.schedule, held.optimizer_steps, known)
    prepare_step(model, step, max_steps)


class HeldTensors(SentInGroups):
    """Those of a `Held`, on every rank."""

    def __init__(self, held: Held, first: Sequence[str]) -> None:
        super().__init__(held.sizes, first)
        self._held = held.tensors

    def sent(self, keys: list[str]) -> dict[str, Tensor]:
        return broadcast_tensors({key: self._held[key] for key in keys} if world().is_main else None)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of the parts that a schedule moves, which it fills on the way (LoRA-Dash's directions)."""
    schedule = attached(model).schedule
    parts = {} if schedule is None else schedule.parts
    return {
        f"{name}.{own}": buffer for name, part in parts.items() for own, buffer in part.named_buffers(recurse=False)
    }
