"""Which weights of a model a storage holds, and which stay as the model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dist_subspace.families.experts import stacks_of
from dist_subspace.loading.as_held import Quantised
from dist_subspace.loading.index import CheckpointIndex
from dist_subspace.loading.packed_head import packed_head
from dist_subspace.loading.sources import Sources
from dist_subspace.loading.stays_dense import check_packed, is_output
from dist_subspace.loading.transformers_internals import kept_type
from dist_subspace.notices import say
from dist_subspace.storage import is_linear, left_alone, storage_info

Held = tuple[str, Mapping[str, Any]]  # a storage and its options


class Packing:
    """Decided by the model, the names and the types of the file alone, before anything is read.

    Arguments:
        head: the storage of a language model's head; None for the type of the computation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        index: CheckpointIndex,
        sources: Sources,
        held: Held,
        dtype: torch.dtype,
        head: Held | None,
    ) -> None:
        self.model, self.sources, self.held, self.dtype = model, sources, held, dtype
        self.kept_type = kept_type(model, dtype)
        self.apart = left_alone(model)
        self.quantised = Quantised(index, *held, dtype)
        self._held_head = head
        self.head = None if head is None else packed_head(model, head[0], self.apart)  # its name

    def held_in(self, name: str) -> Held:
        """The storage of a weight that is packed, and its options."""
        return self._held_head if self._held_head is not None and name == f"{self.head}.weight" else self.held

    def takes_codes(self, name: str) -> bool:
        """Whether the file's own codes are those of the weight's storage."""
        return self.held_in(name)[0] == self.held[0] and self.sources.keys.get(name) in self.quantised.taken

    def packs(self, name: str, module: nn.Module) -> bool:
        """Whether a storage holds the module's weight: it is a linear layer that is read from the file, no head, or one with a
        storage of its own, and of no type of its own (a router made in float32)."""
        full_name = f"{name}.weight"
        if not is_linear(module) or name in self.apart or not self.sources.has(full_name):
            return False
        own_type = self.kept_type(full_name) is not None or module.weight.dtype != self.dtype
        left = self.quantised.leaves(self.sources.keys_of(full_name)) or self._is_output(name)
        return not own_type and (name == self.head or not left)

    def stacks(self, name: str, module: nn.Module) -> dict[str, bool]:
        """The module's stacks of experts that the storage holds, by attribute, and whether they are transposed: those of the
        type of the computation, in a storage that is no float type."""
        found = stacks_of(module) if storage_info(self.held[0]).dtype is None else None
        if found is None:
            return {}
        matrices = {attribute: getattr(module, attribute) for attribute in found.names}
        return {
            attribute: found.transposed
            for attribute, own in matrices.items()
            if self._packs_stack(f"{name}.{attribute}", own)
        }

    def say_what_stays(self) -> None:
        """Notices of layers that stay as the model has them although the storage packs.

        Raises:
            UsageError: the storage would hold nothing of this model.
        """
        if storage_info(self.held[0]).dtype is not None:
            return
        modules = dict(self.model.named_modules())
        packed = [name for name, module in modules.items() if self.packs(name, module) or self.stacks(name, module)]
        apart = self.apart | self.quantised.left(self.model, self.sources.keys_of)
        apart = {name: why for name, why in apart.items() if not self._is_output(name)}
        for sentence in check_packed(self.model, self.held[0], self.dtype, packed, apart):
            say(sentence)

    def _packs_stack(self, name: str, matrices: nn.Parameter) -> bool:
        own_type = self.kept_type(name) is not None or matrices.dtype != self.dtype
        return self.sources.has(name) and not own_type and matrices.dim() == 3

    def _is_output(self, name: str) -> bool:
        return is_output(self.model, name, self.model.get_submodule(name).weight)  # type: ignore[arg-type]
