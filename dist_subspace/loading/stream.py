"""From file to forward: every tensor of a checkpoint read once, held in its storage, put in its place.

This is where reading becomes finer: a rank could read its own rows only. What is read, how it is packed and where it goes are
three calls here, so that only the first would change.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.names import checkpoint_key
from dist_subspace.loading.stays_dense import check_packed
from dist_subspace.loading.transformers_internals import base_prefix, initialise, renamed_keys
from dist_subspace.notices import say
from dist_subspace.placement.zero import Partitioner
from dist_subspace.storage import (
    FrozenLinear,
    Origin,
    PackedLinear,
    adopt,
    is_conv1d,
    is_linear,
    left_alone,
    pack,
    replace,
    storage_info,
)

HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out", "cls", "pre_classifier")


class Stream:
    """The plan of a load, checked in full (every name, every shape) before the first tensor is read, and its execution."""

    def __init__(
        self, model: nn.Module, index: CheckpointIndex, storage: str, double_quant: bool, dtype: torch.dtype, seed: int
    ) -> None:
        self.model, self.index = model, index
        self.storage, self.double_quant = storage, double_quant
        self.dtype, self.seed = dtype, seed
        self.names = renamed_keys(model, index)
        self.apart = left_alone(model)
        self.keys, self.absent = self._match()
        self._check_shapes()
        if storage_info(storage).dtype is None:
            packed = [name for name, module in model.named_modules() if self._packs(name, module)]
            apart = {name: why for name, why in self.apart.items() if not self._is_output_layer(name)}
            for sentence in check_packed(model, storage, dtype, packed, apart):
                say(sentence)

    def run(
        self, device: torch.device, partitioner: Partitioner | None, progress: Callable[[int, int], None] | None
    ) -> None:
        """Read, pack and place; without collectives, though every rank must come here."""
        done: dict[nn.Parameter, nn.Parameter] = {}
        units = list(self._units())
        for number, (name, module) in enumerate(units):
            self._load(name, module, device, partitioner, done)
            if progress is not None:
                progress(number + 1, len(units))
        for name, buffer in list(self.model.named_buffers()):
            self._set_buffer(name, buffer, device)

    def fresh_modules(self) -> tuple[str, ...]:
        """Whose parameters the checkpoint lacks."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.absent))

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in list(self.model.named_modules()):
            if any(True for _ in module.parameters(recurse=False)):
                yield name, module

    def _match(self) -> tuple[dict[str, str], list[str]]:
        """Parameter name -> checkpoint key; tied names share one; and the names that the checkpoint lacks."""
        prefix = base_prefix(self.model)
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        keys, absent = {}, []
        for names in groups.values():
            found = next((k for k in (checkpoint_key(n, self.names, prefix) for n in names) if k), None)
            for name in names:
                if found is not None:
                    keys[name] = found
                else:
                    absent.append(name)
        lost = [name for name in absent if not self._is_head(name)]
        if lost:
            raise UsageError(
                f"model.path is {str(self.index.folder)!r}, whose weights lack {', '.join(lost[:3])}"
                f"{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}; "
                "the checkpoint is incomplete or of another architecture"
            )
        return keys, absent

    def _is_head(self, name: str) -> bool:
        """Whether a checkpoint may lack the parameter: a head for a new task is trained anew. A language model's output
        layer is no such head: without it the model says nothing."""
        if "pooler" in name.split("."):
            return True
        if _output_embeddings(self.model) is not None:
            return False
        prefix = base_prefix(self.model)
        return any(part in HEADS for part in name.split(".")) or (bool(prefix) and not name.startswith(f"{prefix}."))

    def _check_shapes(self) -> None:
        for name, parameter in self.model.named_parameters():
            key = self.keys.get(name)
            if key is not None and self.index.shapes[key] != tuple(parameter.shape):
                raise UsageError(
                    f"{self.index.files[key].name} holds {key} as {list(self.index.shapes[key])}, but config.json asks for "
                    f"{list(parameter.shape)}"
                )

    def _load(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        partitioner: Partitioner | None,
        done: dict[nn.Parameter, nn.Parameter],
    ) -> None:
        if is_linear(module) and name not in self.apart:
            loaded: nn.Module = self._linear(name, module, device, done)
            replace(self.model, name, loaded)
        else:
            self._plain(name, module, device, done)
            loaded = module
        if partitioner is not None:
            for parameter in loaded.parameters(recurse=False):
                partitioner.place(parameter)

    def _linear(
        self, name: str, module: nn.Module, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> FrozenLinear:
        bias = getattr(module, "bias", None)
        ready = None if bias is None else self._parameter(f"{name}.bias", bias, device, done)
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        key = self.keys.get(f"{name}.weight")
        origin = None if key is None else Origin(str(self.index.files[key]), key)
        if key is None or not self._packs(name, module):
            module.weight = self._parameter(f"{name}.weight", weight, device, done)
            module.bias = ready  # type: ignore[assignment]
            return self._as_it_is(module, origin)
        full = self.index.read(key).to(device)
        if not full.dtype.is_floating_point:
            raise UsageError(
                f"{self.index.files[key].name} holds {key} as {full.dtype}; accepted: a floating-point weight"
            )
        packed = pack(
            full, self.storage, transposed=is_conv1d(module), double_quant=self.double_quant, bias=ready, origin=origin
        )
        if isinstance(packed, PackedLinear):
            packed.name, packed.compute_dtype = name, self.dtype
        return packed

    def _packs(self, name: str, module: nn.Module) -> bool:
        """Whether the storage holds the module's weight: it is a linear layer that is read from the file, and no head."""
        if not is_linear(module) or name in self.apart or f"{name}.weight" not in self.keys:
            return False
        return not self._is_output_layer(name)

    def _is_output_layer(self, name: str) -> bool:
        return self._is_output(name, self.model.get_submodule(name).weight)  # type: ignore[arg-type]

    @staticmethod
    def _as_it_is(module: nn.Module, origin: Origin | None) -> FrozenLinear:
        operator = adopt(module)
        assert operator is not None  # only linear layers come here
        operator.origin = origin
        return operator

    def _is_output(self, name: str, weight: nn.Parameter) -> bool:
        """Heads, and weights tied to an embedding, stay in the type of the computation."""
        head = _output_embeddings(self.model)
        inputs = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None  # type: ignore[operator]
        tied = inputs is not None and getattr(inputs, "weight", None) is weight
        return tied or name.split(".")[-1] in HEADS or (head is not None and getattr(head, "weight", None) is weight)

    def _plain(
        self, name: str, module: nn.Module, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{own}" if name else own
            setattr(module, own, self._parameter(full_name, parameter, device, done))

    def _parameter(
        self, name: str, old: nn.Parameter, device: torch.device, done: dict[nn.Parameter, nn.Parameter]
    ) -> nn.Parameter:
        """The real parameter in the place of a meta one; tied ones become one object."""
        if old in done:
            return done[old]
        if not old.is_meta:
            old.data = old.data.to(device)
            old.requires_grad_(False)
            return old
        key = self.keys.get(name)
        value = self._fresh(name, old) if key is None else self.index.read(key)
        parameter = nn.Parameter(value.to(device=device, dtype=old.dtype), requires_grad=False)
        # Keyed by the parameters themselves and not by their ids: an id is used again once its owner is gone.
        done[old] = parameter
        done[parameter] = parameter
        return parameter

    def _fresh(self, name: str, old: nn.Parameter) -> torch.Tensor:
        """Initial values of a parameter that the checkpoint lacks: the family's own, a function of (seed, name)."""
        owner_name, _, own = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        for other, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(owner, other, nn.Parameter(torch.zeros(parameter.shape, dtype=old.dtype), requires_grad=False))
        initialise(self.model, owner, self.seed + zlib.crc32(owner_name.encode()))
        return getattr(owner, own).detach()

    def _set_buffer(self, name: str, buffer: torch.Tensor, device: torch.device) -> None:
        owner, _, own = name.rpartition(".")
        key = checkpoint_key(name, self.names, base_prefix(self.model))
        value = buffer if key is None or self.index.shapes[key] != tuple(buffer.shape) else self.index.read(key)
        self.model.get_submodule(owner)._buffers[own] = value.to(device=device, dtype=buffer.dtype)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
