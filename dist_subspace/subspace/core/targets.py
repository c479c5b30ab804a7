"""Which layers a method acts on."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.families.blocks import block_prefixes
from dist_subspace.families.experts import is_inside_router, routers_among
from dist_subspace.families.heads import base_prefix
from dist_subspace.families.names import ends_with_any, last_component
from dist_subspace.families.norms import is_norm, is_norm_of_projection
from dist_subspace.families.projections import BLOCK_INPUTS, holds_gate, is_attention_output, is_ffn_output
from dist_subspace.families.towers import is_unreached, unreached
from dist_subspace.notices import named
from dist_subspace.subspace.core.operator import Operator

ALL_LINEAR = "all-linear"

UNREACHED = "text never reaches it; accepted for who trains with other inputs: subspace.target_modules with its name"


ROUTER = "it is a router; accepted for who wants it trained: subspace.target_modules with its name"
NAMED_AS_HEAD = (
    "it has the name of an output layer; accepted for who wants it trained: subspace.target_modules with its name"
)


def choose(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: Sequence[str],
    head: Sequence[str],
    apart: Mapping[str, str] | None = None,
    given: bool = True,
    left_out: LeftOut | None = None,
    only: Collection[str] = (),
    beside: Collection[str] = (),
) -> dict[str, Operator]:
    """The frozen operators that are targets, by name, in the model's order.

    Arguments:
        targets: `all-linear` (every linear of the transformer blocks), a list of name endings, or a regular expression that
            matches a whole name.
        exclude: name endings that are left out.
        head: names of the output layers, which `all-linear` leaves out.
        apart: linear layers that are no operators, and why.
        given: whether the user named the targets. What a default means and cannot have is left out.
        left_out: gets the names that were left out.
        only: the layers of an adapter that is loaded; its routers are no targets of a default any more, but stay its own.
        beside: what else the targets name, and the method has (norms); these alone are enough.

    Raises:
        UsageError: if nothing matches (names of the model are shown), or the user named layers that cannot have a method.
    """
    operators = {name: module for name, module in model.named_modules() if isinstance(module, Operator)}
    among = {**dict.fromkeys(operators), **(apart or {})}
    wanted = _in_blocks(model, among, head) if targets == ALL_LINEAR else list(filter(naming(targets), among))
    wanted = [name for name in wanted if not ends_with_any(name, exclude)]
    chosen = {name: operators[name] for name in wanted if name in operators}
    lost = {name: apart[name] for name in wanted if apart and name not in operators}
    if given and targets != ALL_LINEAR:
        _check_named(model, targets, chosen, lost)
        if (chosen or beside) and not isinstance(targets, str) and not only:
            _check_each_names_a_layer(model, targets, [*among, *beside])
    else:
        parts = unreached(model)
        lost |= {name: UNREACHED for name in wanted if is_unreached(name, parts)}
        if targets == ALL_LINEAR:
            lost |= {name: ROUTER for name in routers_among(model, wanted) if name not in only}
        chosen = {name: module for name, module in chosen.items() if name not in lost} or chosen
    if left_out is not None:
        left_out.add(lost)
    if left_out is not None and targets == ALL_LINEAR:
        left_out.add(_matrices_of_other_blocks(model, among))
        left_out.add({name: NAMED_AS_HEAD for name in head if name in among and name.startswith(block_prefixes(model))})
    if not chosen and not beside:
        raise UsageError(
            f"subspace.target_modules is {targets if isinstance(targets, str) else list(targets)!r}"
            f"{f' without {list(exclude)!r}' if exclude else ''}, which matches no linear layer; "
            f"layers of this model are for example: {', '.join(_examples(list(operators)))}"
        )
    return chosen


def _check_named(
    model: nn.Module, targets: str | Sequence[str], chosen: Collection[str], lost: Mapping[str, str]
) -> None:
    """Refuse what the user named where all that it names are layers that cannot have a method."""
    for entry in [targets] if isinstance(targets, str) else targets:
        means = naming(entry if isinstance(targets, str) else [entry])
        named = [name for name in lost if means(name)]
        if any(means(name) for name in chosen):
            continue
        routers = routers_among(model, [name for name, module in model.named_modules() if means(name)])
        if routers and not named:
            kind = type(model.get_submodule(routers[0])).__name__
            raise UsageError(
                f"subspace.target_modules has {entry!r}, which names the router {routers[0]}, a {kind} and no linear layer; "
                f"accepted: subspace.modules_to_save with {entry!r}, which trains it in full"
            )
        if named:
            raise UsageError(
                f"subspace.target_modules has {entry!r}, which names {named[0]}: no method can be put on it, because "
                f"{lost[named[0]]}; accepted: other layers"
                + (f", for example {', '.join(_examples(list(chosen)))}" if chosen else "")
            )


def _check_each_names_a_layer(model: nn.Module, entries: Sequence[str], among: Collection[str]) -> None:
    """Refuse an entry beside others that names nothing: the run would end well and without it."""
    for entry in entries:
        means = naming([entry])
        if any(means(name) for name in among):
            continue
        others = [module for name, module in model.named_modules() if means(name)]
        if others:
            raise UsageError(
                f"subspace.target_modules has {entry!r}, which names {type(others[0]).__name__} and no linear layer; accepted: "
                f"subspace.modules_to_save with {entry!r}, which trains it in full (experts: subspace.target_parameters)"
            )
        raise UsageError(
            f"subspace.target_modules has {entry!r}, which matches no linear layer; layers of this model are for example: "
            f"{', '.join(_examples(list(among)))}"
        )


def check_excluded(model: nn.Module, exclude: Sequence[str]) -> None:
    """Local.

    Raises:
        UsageError: an entry that names no layer, and would leave nothing out; a block or a tower is none.
    """
    layers = [
        n
        for n, m in model.named_modules()
        if isinstance(m, Operator) or next(m.parameters(recurse=False), None) is not None
    ]
    for entry in exclude:
        if not any(map(naming([entry]), layers)):
            raise UsageError(
                f"subspace.exclude_modules has {entry!r}, which names no layer; accepted: name endings of layers, for example "
                f"{', '.join(_examples(layers))}"
            )


class LeftOut:
    """What a default target means and does not get: names by reason, for one sentence each."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def add(self, lost: Mapping[str, str]) -> None:
        for name, reason in lost.items():
            names = self.reasons.setdefault(reason, [])
            if name not in names:
                names.append(name)

    def note(self, sentence: str) -> None:
        """Something else to say about a default."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def sentences(self, targets: str | Sequence[str]) -> list[str]:
        what = ALL_LINEAR if targets == ALL_LINEAR else "the targets"
        lost = [f"left out of {what}: {named(names)}; {reason}" for reason, names in self.reasons.items()]
        return [*self.notes, *lost]


@dataclass(frozen=True)
class Choice:
    """What a method chooses its sites from: the model, and what the configuration says about targets.

    targets: `all-linear`, name endings, or a regular expression; given: whether the user named them; head: the names of the
    output layers; exclude: name endings that are left out, those of modules trained in full among them; options: the
    method's own, every one with a value; apart: linear layers that can have no method, and why; left_out: collects what a
    default means and does not get; only: the layers of an adapter that is loaded, which a method's own names may exceed.
    """

    model: nn.Module
    targets: str | Sequence[str]
    given: bool
    exclude: Sequence[str]
    head: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    only: Collection[str] = ()

    def operators(self, beside: Collection[str] = ()) -> dict[str, nn.Module]:
        """The linear operators that are targets, by name. beside: what else the targets name, and the method has."""
        if self.given or isinstance(self.targets, str):
            return self._chosen(self.targets, self.given, beside)
        chosen = self._chosen(self._known(), False)
        if self.only:
            return {name: module for name, module in chosen.items() if name in self.only}
        return {name: module for name, module in chosen.items() if not is_inside_router(name)}

    def _known(self) -> Sequence[str]:
        """The method's own names, or what stands for them in a family that has none; what is near them is said."""
        names = [
            n
            for n, m in self.model.named_modules()
            if (isinstance(m, Operator) or n in self.apart) and n not in self.head
        ]
        if any(map(naming(self.targets), names)):
            fused = [n for n in names if holds_gate(n) and not naming(self.targets)(n)]
            self.left_out.add(dict.fromkeys(fused, "it holds a gate too, and a gate is not scaled"))
            return self.targets
        inputs = [n for n in names if ends_with_any(n, BLOCK_INPUTS)]
        if inputs:
            self.left_out.note(
                f"no layer of a {type(self.model).__name__} is known as a key, value or FFN-up projection: the targets are its "
                f"input projections, {named(inputs)}"
            )
            return BLOCK_INPUTS
        raise UsageError(
            "subspace.target_modules is not given, and no layer of this model has a known name of a key, value or FFN-up "
            f"projection; accepted: a list of name endings; layers here are for example: {', '.join(_examples(names)) or 'none'}"
        )

    def all_linear(self) -> dict[str, nn.Module]:
        """Every linear operator of the blocks, whatever the targets are."""
        return self._chosen(ALL_LINEAR, False)

    def _chosen(self, targets: str | Sequence[str], given: bool, beside: Collection[str] = ()) -> dict[str, nn.Module]:
        left_out, only = self.left_out, self.only
        return choose(self.model, targets, self.exclude, self.head, self.apart, given, left_out, only, beside)  # type: ignore[return-value]

    def excluded(self, name: str) -> bool:
        return ends_with_any(name, self.exclude)

    def attention_outputs(self) -> dict[str, nn.Module]:
        """The output projection of every attention in the blocks."""
        return self._outputs("attention", is_attention_output)

    def ffn_outputs(self) -> dict[str, nn.Module]:
        """The output layer of every FFN in the blocks."""
        return self._outputs("FFN", is_ffn_output)

    def norms(self) -> dict[str, nn.Module]:
        """Every norm with trainable values of its own, heads apart; not narrowed by `targets`."""
        base = base_prefix(self.model)
        inside = f"{base}." if base and hasattr(self.model, base) else ""
        every_norm = {name: module for name, module in self.model.named_modules() if is_norm(module)}
        parts = ((), ()) if self.given else unreached(self.model)
        here = {name: m for name, m in every_norm.items() if name.startswith(inside) and not is_unreached(name, parts)}
        return {name: m for name, m in here.items() if not self.excluded(name)}

    def block_norms(self) -> dict[str, nn.Module]:
        """The norms of the blocks, apart from those of queries, keys and values and those inside a router; an adapter that is
        loaded may have these."""
        prefixes = block_prefixes(self.model)
        inside = {name: norm for name, norm in self.norms().items() if name.startswith(prefixes)}
        return {
            name: norm
            for name, norm in inside.items()
            if not is_norm_of_projection(name) and (name in self.only or not is_inside_router(name))
        }

    def in_order(self, names: Collection[str]) -> dict[str, nn.Module]:
        """The modules of these names, in the model's order."""
        return {name: module for name, module in self.model.named_modules() if name in names}

    def _outputs(self, what: str, has_role: Callable[[str], bool]) -> dict[str, nn.Module]:
        linear = choose(self.model, ALL_LINEAR, self.exclude, self.head, self.apart, False, only=self.only)
        outputs: dict[str, nn.Module] = {n: m for n, m in linear.items() if has_role(n) or n in self.only}  # type: ignore[misc]
        self.left_out.add({name: reason for name, reason in self.apart.items() if has_role(name)})
        if not outputs:
            raise UsageError(
                f"subspace.target_modules is not given, and no layer of this model has a known name of an {what} output; "
                f"accepted: a list of name endings; layers here are for example: {', '.join(_examples(list(linear)))}"
            )
        return outputs


def naming(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether name endings, or a regular expression, mean a name."""
    if isinstance(targets, str):
        pattern = _pattern(targets)
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: ends_with_any(name, targets)


def _in_blocks(model: nn.Module, operators: Collection[str], head: Sequence[str]) -> list[str]:
    prefixes = block_prefixes(model)
    return [name for name in [n for n in operators if n.startswith(prefixes)] or operators if name not in head]


def _matrices_of_other_blocks(model: nn.Module, linear: Collection[str]) -> dict[str, str]:
    """What holds the weights of blocks without a linear layer (SqueezeBERT's convolutions, I-BERT's own classes), and why a
    default cannot have it: only what stands beside the blocks is adapted then."""
    prefixes = block_prefixes(model)
    if any(name.startswith(prefixes) for name in linear):
        return {}
    return {
        name: f"a {type(module).__name__} is no linear layer"
        for name, module in model.named_modules()
        if name.startswith(prefixes) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"subspace.target_modules is {text!r}, which is no regular expression ({error}); "
            f"accepted: {ALL_LINEAR}, a list of name endings, or a regular expression"
        ) from error


def _examples(names: list[str]) -> list[str]:
    """One name for each distinct ending, so that few names show every kind of layer."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(last_component(name), name)
    return list(kinds.values())[:8]
