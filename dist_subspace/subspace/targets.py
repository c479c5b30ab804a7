"""Which linear layers a method acts on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dist_subspace.errors import UsageError
from dist_subspace.subspace.method import Operator

ALL_LINEAR = "all-linear"

# Key, value and FFN-up by the names that model families use (methods.md 14.1). A gate is never one of them: scaling
# before the activation is another function. A fused QKV counts as key and value.
KEY_VALUE_UP = (
    *(
        "k_proj",
        "v_proj",
        "key",
        "value",
        "k_lin",
        "v_lin",
        "key_proj",
        "value_proj",
        "SelfAttention.k",
        "SelfAttention.v",
    ),
    *("EncDecAttention.k", "EncDecAttention.v", "attn.c_attn", "query_key_value", "qkv_proj", "Wqkv"),
    *("up_proj", "intermediate.dense", "fc1", "c_fc", "lin1", "dense_h_to_4h", "wi", "wi_1", "up", "fc_in"),
)


def choose(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str], head: Sequence[str]
) -> dict[str, Operator]:
    """The frozen operators that are targets, by name, in the model's order.

    Arguments:
        targets: `all-linear` (every linear of the transformer blocks), a list of name endings, or a regular expression that
            matches a whole name.
        exclude: name endings that are left out.
        head: names of the output layers, which `all-linear` leaves out.

    Raises:
        UsageError: if nothing matches; some of the model's names are shown.
    """
    operators = {name: module for name, module in model.named_modules() if isinstance(module, Operator)}
    if targets == ALL_LINEAR:
        wanted = _in_blocks(model, operators, head)
    elif isinstance(targets, str):
        wanted = [name for name in operators if _pattern(targets).fullmatch(name)]
    else:
        wanted = [name for name in operators if any(ends_with(name, ending) for ending in targets)]
    chosen = {name: operators[name] for name in wanted if not any(ends_with(name, ending) for ending in exclude)}
    if not chosen:
        raise UsageError(
            f"subspace.target_modules is {targets if isinstance(targets, str) else list(targets)!r}"
            f"{f' without {list(exclude)!r}' if exclude else ''}, which matches no linear layer; "
            f"layers of this model are for example: {', '.join(_examples(list(operators)))}"
        )
    return chosen


@dataclass(frozen=True)
class Choice:
    """What a method chooses its sites from: the model, and what the configuration says about targets.

    targets: `all-linear`, name endings, or a regular expression; given: whether the user named them; head: the names of the
    output layers; exclude: name endings that are left out, those of modules trained in full among them.
    """

    model: nn.Module
    targets: str | Sequence[str]
    given: bool
    exclude: Sequence[str]
    head: Sequence[str]

    def operators(self) -> dict[str, nn.Module]:
        """The linear operators that are targets, by name."""
        return choose(self.model, self.targets, self.exclude, self.head)  # type: ignore[return-value]

    def excluded(self, name: str) -> bool:
        return any(ends_with(name, ending) for ending in self.exclude)


def ends_with(name: str, ending: str) -> bool:
    """Whether a dotted name is, or ends in, the given whole components."""
    return name == ending or name.endswith("." + ending)


def _in_blocks(model: nn.Module, operators: dict[str, Operator], head: Sequence[str]) -> list[str]:
    stacks = [name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = [name for name in operators if any(name.startswith(stack) for stack in stacks)]
    return [name for name in inside or operators if name not in head]


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
        kinds.setdefault(name.rpartition(".")[2], name)
    return list(kinds.values())[:8]
