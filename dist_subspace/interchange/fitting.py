"""Whether an adapter fits a model, which is only looked at: one list of checks for every way in. Local."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_subspace.errors import UsageError
from dist_subspace.families.configuration import config_of, text_config
from dist_subspace.families.experts import stacks_of
from dist_subspace.families.names import ends_with
from dist_subspace.module_places import parameters_of
from dist_subspace.placement.tensors import full_shape
from dist_subspace.storage import FrozenStack, is_linear, linear_shape
from dist_subspace.subspace import Operator, SubspaceConfig, method_class
from dist_subspace.subspace.core.peft_words import PREFIX
from dist_subspace.subspace.virtual_tokens.part import EMBEDDINGS, VirtualTokens


def check_fits(
    model: nn.Module,
    config: SubspaceConfig,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int | None]],
) -> None:
    """Raises UsageError for a model that the adapter is not for.

    Arguments:
        tensors: by our file's keys. described: the adapter's description. shapes: as for `check_layers`.
    """
    check_layers(model, shapes)
    _check_saved(model, config.modules_to_save, tensors)
    _check_tokens(model, config.method, tensors, described)


def _check_saved(model: nn.Module, endings: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """PEFT trains a copy of a tied module apart from the module that it is tied to; ours stay tied: two tensors that differ are
    never put into one parameter, of which the last would stay."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for ending in endings:
        named = [name for name in modules if name and ends_with(name, ending)]
        if not named:
            raise UsageError(f"the adapter holds {ending} trained in full, which is no module of this model")
        for saved in named:
            for key, other in _tied(modules, saved):
                first, second = (tensors.get(f"{PREFIX}{tied}") for tied in (key, other))
                if first is None or second is None or not torch.equal(first, second):
                    raise UsageError(
                        f"the adapter holds {saved} trained apart from {other.rpartition('.')[0]}, to which this model ties it; "
                        "accepted: a base model with tie_word_embeddings: false"
                    )


def _tied(modules: Mapping[str, nn.Module], saved: str) -> Iterator[tuple[str, str]]:
    """Keys of a saved module's parameters, each with the key of the same parameter in another module."""
    inside = {name: module for name, module in modules.items() if name == saved or name.startswith(f"{saved}.")}
    places = {
        id(p): f"{name}.{_key(parameter_name)}"
        for name, module in inside.items()
        for parameter_name, p in parameters_of(module).items()
    }
    for name, module in modules.items():
        for parameter_name, parameter in parameters_of(module).items():
            # A module that holds the bias of an output layer inside it, as BERT's does.
            around = saved.startswith(f"{name}.")
            if parameter is not None and name not in inside and not around and id(parameter) in places:
                yield places[id(parameter)], f"{name}.{_key(parameter_name)}"


def _key(parameter: str) -> str:
    """What a file calls a module's parameter, whatever the storage of a frozen weight calls it."""
    return "bias" if parameter == "bias" else "weight"


def _check_tokens(model: nn.Module, method: str, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    tokens, kind = tensors.get(EMBEDDINGS), method_class(method)
    if tokens is not None and issubclass(kind, VirtualTokens):
        kind.check_fits(tokens, described, text_config(config_of(model)))


def check_layers(model: nn.Module, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Raises UsageError for a model that lacks a layer of the adapter, or whose layer has another shape.

    Arguments:
        shapes: `(d_out, d_in)` of the adapter's linear layers by name, None for a side that is not known.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        here = _shape_of(modules.get(name))
        if here is None:
            raise UsageError(
                f"the adapter is for {name}, which is no linear layer of this model ({type(model).__name__}): it belongs to "
                f"another base model; layers here are for example: {', '.join(_examples(model))}"
            )
        if any(side is not None and side != other for side, other in zip(shape, here, strict=True)):
            wanted = " x ".join("?" if size is None else str(size) for size in shape)
            raise UsageError(
                f"the adapter is for a {name} of {wanted}, but this model's is {here[0]} x {here[1]}: it belongs to "
                "another base model"
            )


def stack_in(model: nn.Module, name: str) -> tuple[bool, tuple[int, int, int]]:
    """Of a stack of experts whether PEFT takes its layout for the other one, and `(experts, d_out, d_in)`, packed or not.

    Raises:
        UsageError: the model has no stack of that name.
    """
    owner_name, _, own = name.rpartition(".")
    owner = dict(model.named_modules()).get(owner_name)
    stacks = None if owner is None else stacks_of(owner)
    if owner is None or stacks is None or own not in stacks.names:
        raise UsageError(
            f"the adapter is for the experts {name}, which this model ({type(model).__name__}) has not as one stack: it belongs "
            "to another base model"
        )
    held = getattr(owner, own)
    if isinstance(held, FrozenStack):
        shape = (held.experts, *held.expert_shape)
    else:
        experts, first, second = full_shape(held)
        shape = (experts, second, first) if stacks.transposed else (experts, first, second)
    return taken_as_turned(owner, stacks.transposed), shape


def taken_as_turned(owner: nn.Module, transposed: bool) -> bool:
    """Whether PEFT takes a stack's layout for the other one.

    Arguments:
        owner: the module that has it; transposed: whether it is `(experts, d_in, d_out)`.
    """
    return transposed and not getattr(owner, "is_transposed", False)


def _shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """`(d_out, d_in)` of a linear layer, whoever made it."""
    if isinstance(module, Operator):
        return module.out_features, module.in_features
    if module is not None and (is_linear(module) or hasattr(module, "in_features")):
        return linear_shape(module)
    return None


def _examples(model: nn.Module) -> list[str]:
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Operator) or is_linear(module):
            kinds.setdefault(name.rpartition(".")[2], name)
    return list(kinds.values())[:4]
