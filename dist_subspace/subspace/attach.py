"""Put a method on a model: choose its targets, wrap them, freeze everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.config import Resolved, SubspaceConfig, resolve
from dist_subspace.subspace.method import MethodInfo, Operator, SubspaceLinear
from dist_subspace.subspace.targets import choose, ends_with
from dist_subspace.subspace.trained_copy import Gathered, TrainedCopy


@dataclass(frozen=True)
class Attachment:
    """What `attach` did, kept on the model: the configuration, the wrapped layers, the modules trained in full, and every
    trained parameter's name and shape (which a partitioned parameter no longer shows)."""

    config: SubspaceConfig
    resolved: Resolved
    layers: tuple[str, ...]
    saved_modules: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def info(self) -> MethodInfo:
        return self.resolved.info


def attach_method(model: nn.Module, config: SubspaceConfig, gathered: Gathered) -> nn.Module:
    """Wrap the model's frozen operators by the configured method; its linear layers are operators already.

    Arguments:
        gathered: a context in which the given parameters are whole (collective where they are split over ranks).

    Raises:
        UsageError: for a model that has a method already, a target that matches nothing, a rank above a layer's
            dimensions, and what `resolve` refuses. The model is untouched then.
    """
    if attachment(model) is not None:
        raise UsageError("the model has a subspace method already; attach takes a model without one")
    resolved = resolve(config)
    head = _head_names(model)
    saved = _modules_to_save(model, config)
    trained_in_full = [n for n, _ in model.named_modules() if any(n == s or n.startswith(f"{s}.") for s in saved)]
    chosen = choose(model, resolved.targets, [*config.exclude_modules, *trained_in_full], head)
    _check_rank(resolved, chosen)
    model.requires_grad_(False)
    shared: dict[int, nn.Parameter] = {}
    for name in saved:
        _replace(model, name, TrainedCopy(model.get_submodule(name), gathered, shared))
    for name, operator in chosen.items():
        _replace(model, name, _wrap(name, operator, resolved))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    model.subspace = Attachment(config, resolved, tuple(chosen), tuple(saved), shapes)  # type: ignore[assignment]
    _let_gradients_start_at_the_embeddings(model)
    return model


def attachment(model: nn.Module) -> Attachment | None:
    return getattr(model, "subspace", None)


def attached(model: nn.Module) -> Attachment:
    """The model's attachment; a UsageError if it has none."""
    found = attachment(model)
    if found is None:
        raise UsageError("the model has no subspace method; call attach first")
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what the frozen base computes alone."""
    parts = [m for m in model.modules() if isinstance(m, (SubspaceLinear, TrainedCopy))]
    before = [part.enabled for part in parts]
    for part in parts:
        part.enabled = False
    try:
        yield model
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


def _wrap(name: str, operator: Operator, resolved: Resolved) -> SubspaceLinear:
    generator = torch.Generator().manual_seed(_seed_of(resolved.config.seed, name))
    device = next(operator.parameters()).device
    layer = resolved.method(operator, resolved.settings, generator)
    for own, parameter in layer.trainables().items():
        setattr(layer, own, nn.Parameter(parameter.data.to(device)))
    return layer.train(operator.training)


def _seed_of(seed: int, name: str) -> int:
    """A layer's initial values depend on its name alone: not on the rank, nor on which other layers are targets."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _check_rank(resolved: Resolved, chosen: dict[str, Operator]) -> None:
    rank = resolved.settings.rank
    name = min(chosen, key=lambda n: min(chosen[n].in_features, chosen[n].out_features))
    rows, columns = chosen[name].out_features, chosen[name].in_features
    if rank > min(rows, columns):
        raise UsageError(
            f"subspace.rank is {rank}, but {name} is {rows} x {columns}; accepted: at most {min(rows, columns)} "
            "(or leave such layers out by subspace.exclude_modules)"
        )


def _head_names(model: nn.Module) -> list[str]:
    """Output layers: what the model says, and the usual names of classification heads."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    usual = ("lm_head", "score", "classifier", "qa_outputs", "embed_out")
    return [n for n, m in model.named_modules() if m is head or any(ends_with(n, u) for u in usual)]


def _modules_to_save(model: nn.Module, config: SubspaceConfig) -> list[str]:
    """The names in `modules_to_save`, and the modules whose parameters are tied to theirs."""
    names = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    wanted: list[str] = []
    for ending in config.modules_to_save:
        found = [name for name in names if ends_with(name, ending)]
        if not found:
            shown = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names[-12:]))
            raise UsageError(
                f"subspace.modules_to_save has {ending!r}, which names no module; names here end in: {shown}"
            )
        wanted += [name for name in found if name not in wanted]
    owned = {id(p) for name in wanted for p in model.get_submodule(name).parameters()}
    inside = [name for name in names if any(name.startswith(w + ".") for w in wanted)]
    tied = [n for n in names if any(id(p) in owned for p in model.get_submodule(n).parameters(recurse=False))]
    return wanted + [name for name in tied if name not in wanted and name not in inside]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _let_gradients_start_at_the_embeddings(model: nn.Module) -> None:
    """Reentrant checkpointing passes gradients only where an input of the block asks for one; with frozen embeddings none
    does, and training fails with "element 0 of tensors does not require grad" (pains.md row 15)."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    if embeddings is None:
        return

    def require(module: nn.Module, inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled() and module.training and _is_checkpointing(model):
            output.requires_grad_(True)

    embeddings.register_forward_hook(require)


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether activation checkpointing is on, as transformers marks it on its blocks."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
