"""Forwards of mixtures of experts whose stacks are frozen operators; the only file that touches transformers' own for experts.

Read against transformers 5.23.0 (`integrations/moe.py`: `ALL_EXPERTS_FUNCTIONS`, `use_experts_implementation`, which gives a
class `_apply_gate` and looks the function up by `config._experts_implementation`; `modeling_llama4.py`, `modeling_jetmoe.py`,
`modeling_longcat_flash.py`, `modeling_step3p7.py`); tests/loading/test_experts_internals.py fails when what is used here moves.

A stack is called as a module, once a forward and on every rank, whichever experts the rank's tokens go to: a sharding engine
gathers it there, and ranks whose tokens go to different experts make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dist_subspace.families.experts import stacks_of
from dist_subspace.families.names import ends_with_any
from dist_subspace.placement.tensors import full_shape
from dist_subspace.storage import FrozenStack, adopt_stack

NAME = "dist_subspace"


def call_stacks(module: nn.Module) -> None:
    """Let the module's forward call its stacks as modules (those of them that are). Nothing else of the model changes."""
    stacks = stacks_of(module)
    assert stacks is not None  # only modules that hold stacks come here
    if stacks.call == "routed":
        config: Any = module.config
        config._experts_implementation = NAME
    else:
        module.forward = MethodType(_OWN_FORWARDS[stacks.call], module)  # type: ignore[assignment]


def adopt_stacks(model: nn.Module, endings: Sequence[str] | None = None) -> None:
    """Let the stacks that these endings name (None: all) be operators where they are plain parameters, in a model that is held in
    floats. A model whose weights are split gains by it: nothing of a gathered stack is saved for backward."""
    for name, module in list(model.named_modules()):
        stacks = stacks_of(module)
        for attribute in () if stacks is None else stacks.names:
            held = getattr(module, attribute)
            wanted = endings is None or ends_with_any(f"{name}.{attribute}", endings)
            if (
                stacks
                and isinstance(held, nn.Parameter)
                and held.dtype == getattr(model, "dtype", held.dtype)
                and wanted
            ):
                delattr(module, attribute)  # a module cannot take a parameter's place
                setattr(module, attribute, adopt_stack(held, full_shape(held), transposed=stacks.transposed))
                call_stacks(module)


def release_stacks(model: nn.Module, endings: Sequence[str]) -> None:
    """The inverse, for the stacks of floats inside the modules that these endings name, which are to be trained in full."""
    named = [module for name, module in model.named_modules() if ends_with_any(name, endings)]
    for module in {inner for outer in named for inner in outer.modules()}:
        stacks = stacks_of(module)
        for attribute in () if stacks is None else stacks.names:
            stack = getattr(module, attribute)
            if isinstance(stack, FrozenStack) and stack.is_float:
                delattr(module, attribute)
                module.register_parameter(attribute, next(stack.parameters()))


def routed(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`(tokens, hidden)`: each token's experts' outputs, weighted and added up, as transformers' `grouped_mm` computes them.

    Arguments:
        hidden_states: `(tokens, hidden)`. top_k_index, top_k_weights: `(tokens, k)`; an index beyond the experts is none.
    """
    gate = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    return _routed(experts, hidden_states, top_k_index, top_k_weights, experts.num_experts, gate)


def or_passed(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same for LongCat-Flash, whose experts beyond the routed ones are identities, without weights."""
    routed_experts = experts.num_routed_experts

    def gate(both: Tensor) -> Tensor:
        gated, up = both.chunk(2, dim=-1)
        activated: Tensor = experts.act_fn(gated)
        return activated * up

    y = _routed(experts, hidden_states, top_k_index, top_k_weights, routed_experts, gate)
    passed = top_k_weights.masked_fill(top_k_index < routed_experts, 0.0).sum(dim=1, keepdim=True)
    return y + (hidden_states * passed).to(y.dtype)


def _routed(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    number: int,
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    stacks = stacks_of(experts)
    assert stacks is not None and stacks.leaving is not None
    tokens, k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(ids, minlength=number)[:number].tolist()
    weights = top_k_weights.reshape(-1)[order]
    if sum(counts) < ids.numel():
        weights = weights.masked_fill(ids >= number, 0.0)
        ids = ids.clamp(max=number - 1)
    y = gate(_product(experts, stacks.entering, hidden_states[order // k], counts, ids))
    y = _product(experts, stacks.leaving, y, counts, ids)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = (y * weights.unsqueeze(-1))[torch.argsort(order)]
    return y.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def every_token(experts: Any, hidden_states: Tensor) -> Tensor:
    """`(experts x tokens, hidden)`: Llama 4 gives every expert a copy of all tokens, scaled by its score, most by zero."""
    stacks = stacks_of(experts)
    assert stacks is not None and stacks.leaving is not None
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    counts = [len(rows) // experts.num_experts] * experts.num_experts
    gate, up = _product(experts, stacks.entering, rows, counts).chunk(2, dim=-1)
    return _product(experts, stacks.leaving, up * experts.act_fn(gate), counts)


def sorted_tokens(experts: Any, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
    """`(rows, d_out)`: JetMoe calls each stack by itself, with the rows in the order of their experts."""
    stacks = stacks_of(experts)
    assert stacks is not None
    return _product(experts, stacks.entering, inputs, expert_size)


def _product(experts: nn.Module, name: str, x: Tensor, counts: Sequence[int], ids: Tensor | None = None) -> Tensor:
    """The product of sorted rows with a stack, and its bias; a stack that is a plain parameter still (its family keeps it in a
    type of its own) is multiplied with expert by expert."""
    stack = getattr(experts, name)
    if isinstance(stack, nn.Module):
        y: Tensor = stack(x, counts)
    else:
        pieces = zip(x.split([*counts, len(x) - sum(counts)]), stack, strict=False)
        turned = stacks_of(experts).transposed  # type: ignore[union-attr]
        made = [functional.linear(rows, matrix.t() if turned else matrix) for rows, matrix in pieces]
        y = torch.cat([*made, x.new_zeros(len(x) - sum(counts), made[0].shape[1])])
    bias = getattr(experts, f"{name}_bias", None) if ids is not None else None
    return y if bias is None else y + bias[ids].to(y.dtype)


_OWN_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "routed_apart": routed,
    "or_passed": or_passed,
    "every_token": every_token,
    "sorted": sorted_tokens,
}
ALL_EXPERTS_FUNCTIONS.register(NAME, routed)
