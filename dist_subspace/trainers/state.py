"""What a Trainer's checkpoint holds beside the adapter: the trained parameters as they are, and where the schedule stands.

An adapter's file may hold something else than the parameters (a P-tuning encoder's result), and does not say how far a
schedule has come. Optimizer, learning rate and random numbers are Trainer's.
"""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace.checkpoint.state import adapter_by_part, on_rank_zero_only
from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import READABLE, adapter_tensors
from dist_subspace.interchange.description import WEIGHTS
from dist_subspace.placement.collectives import agreed, broadcast_tensors, on_main
from dist_subspace.placement.tensors import gathered
from dist_subspace.subspace import attached, named_trainables

STATE = "subspace_state.safetensors"
_VALUE = "value."
_SCHEDULE = "schedule."


def save_state(model: nn.Module, folder: Path) -> None:
    """Collective: write the state into a checkpoint's folder; rank 0 alone writes."""
    schedule, trained = attached(model).schedule, named_trainables(model)
    with gathered(trained.values()), torch.no_grad():
        tensors = {f"{_VALUE}{name}": p.detach().to("cpu", copy=True).contiguous() for name, p in trained.items()}
    kept = {} if schedule is None else schedule.tensors()
    tensors |= {f"{_SCHEDULE}{name}": tensor.to("cpu").contiguous() for name, tensor in kept.items()}
    numbers = {} if schedule is None else schedule.state()

    def write() -> None:
        partial = folder / f".{STATE}"
        save_file(tensors, partial, metadata={"schedule": json.dumps(numbers)})
        partial.chmod(READABLE)
        os.replace(partial, folder / STATE)

    on_main(write)


def restore_values(model: nn.Module, folder: Path) -> None:
    """Collective: the trained parameters, which are whole, get a checkpoint's values.

    Raises:
        UsageError: no checkpoint of this package's, or one of another method, rank or base model.
    """
    stored = _tensors(folder, _VALUE)
    trained = named_trainables(model)
    with agreed("comparing the checkpoint with the model"):
        _check_alike(folder, stored, attached(model).shapes)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def restore_schedule(model: nn.Module, folder: Path) -> None:
    """Collective: the schedule goes on from where it stood; and the model computes with what the checkpoint's adapter holds.

    Raises:
        UsageError: frozen factors of the method came out otherwise than in the checkpoint.
    """
    schedule = attached(model).schedule
    if schedule is not None:
        tensors = _tensors(folder, _SCHEDULE)
        kept = broadcast_tensors(on_rank_zero_only(adapter_by_part, folder))
        schedule.restore(on_main(_numbers, folder / STATE), ChainMap(kept, tensors))
    held = adapter_tensors(model)
    on_main(_check_adapter, folder, held)


def _tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    """Collective: those of a kind by their own names, on every rank."""

    def read() -> dict[str, Tensor]:
        if not (folder / STATE).is_file():
            raise UsageError(
                f"{folder} has no {STATE}; accepted: a checkpoint that a trainer with dist_subspace.TrainerMixin wrote"
            )
        with safe_open(folder / STATE, framework="pt", device="cpu") as handle:
            names = [name for name in handle.keys() if name.startswith(kind)]  # noqa: SIM118
            return {name.removeprefix(kind): handle.get_tensor(name) for name in names}

    return broadcast_tensors(on_rank_zero_only(read))


def _numbers(file: Path) -> dict[str, object]:
    with safe_open(file, framework="pt", device="cpu") as handle:
        numbers: dict[str, object] = json.loads((handle.metadata() or {}).get("schedule", "{}"))
    return numbers


def _check_alike(folder: Path, stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    there = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name in sorted(there.keys() | shapes.keys()):
        if there.get(name) != shapes.get(name):
            raise UsageError(
                f"{folder} has {name} as {there.get(name)}, and the model as {shapes.get(name)}; accepted: a checkpoint of the "
                "same method, rank and base model"
            )


def _check_adapter(folder: Path, held: Mapping[str, Tensor]) -> None:
    """Rank 0: whether the model's adapter is the checkpoint's, the frozen factors with it, to the bit."""
    with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
        for key in sorted(handle.keys() | held.keys()):
            here = held.get(key)
            there = handle.get_tensor(key) if key in handle.keys() else None  # noqa: SIM118
            alike = here is not None and there is not None and here.shape == there.shape
            if not alike or not torch.equal(here.nan_to_num(), there.nan_to_num()):  # type: ignore[union-attr]
                raise UsageError(
                    f"{folder} holds another {key} than the model has after it was read: its base model, method or machine is "
                    "another; accepted: dist_subspace.load_adapter of it, and a new run"
                )
