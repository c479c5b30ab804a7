"""What an import has read from PEFT's two files, and whether a model fits it. Local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.interchange.adapter import PREFIX, file_key
from dist_subspace.interchange.fitting import Shapes, check_layers
from dist_subspace.subspace import SubspaceConfig
from dist_subspace.subspace.targets import ends_with
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS

Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Imported:
    """config: of our method. tensors: by our file's keys. described: PEFT's adapter_config.json. shapes: `(d_out, d_in)` of the
    layers, None for a side that the tensors do not tell. needs_base: part of the adapter must be made from the base again."""

    config: SubspaceConfig
    tensors: dict[str, Tensor]
    described: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    needs_base: bool = False

    def check(self, model: nn.Module) -> None:
        """Raises UsageError for a model that the adapter does not fit; the model is only looked at."""
        check_layers(model, self.shapes)
        self._check_saved(model)
        self._check_tokens(model)

    def _check_saved(self, model: nn.Module) -> None:
        """PEFT trains a copy of a tied module apart from the module that it is tied to; ours stay tied."""
        names = dict(model.named_modules())
        for saved in self.config.modules_to_save:
            if saved not in names:
                raise UsageError(f"the adapter holds {saved} trained in full, which is no module of this model")
            owned = {id(p) for p in names[saved].parameters()}
            tied = [n for n, m in names.items() if any(id(p) in owned for p in m.parameters(recurse=False))]
            apart = [n for n in tied if n != saved and not n.startswith(f"{saved}.") and not self._same(saved, n)]
            if apart:
                raise UsageError(
                    f"the adapter holds {saved} trained apart from {apart[0]}, to which this model ties it; accepted: a base "
                    "model with tie_word_embeddings: false"
                )

    def _check_tokens(self, model: nn.Module) -> None:
        if EMBEDDINGS not in self.tensors:
            return
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        wanted: Any
        what, wanted, found = "width", self.tensors[EMBEDDINGS].shape[1], config.hidden_size
        if self.config.method == "prefix":
            what, wanted, found = "number of layers", self.described.get("num_layers"), config.num_hidden_layers
        if wanted != found:
            raise UsageError(
                f"the adapter is for a {what} of {wanted}, but this model's is {found}: it belongs to another base model"
            )

    def _same(self, first: str, second: str) -> bool:
        a, b = (self.tensors.get(f"{PREFIX}{name}.weight") for name in (first, second))
        return a is not None and b is not None and torch.equal(a, b)


def split_saved(tensors: Mapping[str, Tensor], endings: Iterable[str]) -> tuple[dict[str, Tensor], Layers]:
    """The tensors of the method, and those of modules that were trained in full, by module."""
    own: dict[str, Tensor] = {}
    saved: Layers = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts) - 1)]
        module = next((m for m in modules if any(ends_with(m, ending) for ending in endings)), None)
        if module is None or not key.startswith(PREFIX):
            own[key] = tensor
        else:
            saved.setdefault(module, {})[key] = tensor
    return own, saved


def by_layer(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], kind: str) -> Layers:
    """The tensors of each layer under our suffixes.

    Arguments:
        suffixes: as PEFT writes them, now or earlier -> ours.

    Raises:
        UsageError: a tensor that is none of them, or a layer that lacks one.
    """
    layers: Layers = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.startswith(PREFIX) and key.endswith(f".{s}")), None)
        if suffix is None:
            raise UsageError(
                f"the {kind} adapter holds {key}, which is not known here; accepted: of linear layers, {', '.join(suffixes)}"
            )
        layers.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), {})[suffixes[suffix]] = tensor
    for name, held in layers.items():
        missing = set(suffixes.values()) - held.keys()
        if missing:
            raise UsageError(f"the {kind} adapter lacks {min(missing)} of {name}; it was not saved whole")
    if not layers:
        raise UsageError(f"the {kind} adapter holds no tensors of any layer")
    return layers


def flat(layers: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {file_key(name, s): t.float() for name, held in layers.items() for s, t in held.items()}
    return tensors | {key: t.float() for held in saved.values() for key, t in held.items()}
