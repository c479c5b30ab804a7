"""What an engine's optimizer holds of a parameter on this rank, at every stage.

Read against deepspeed 0.19.8 (`utils/tensor_fragment.py`, `utils/mixed_precision_linkage.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_subspace.placement.deepspeed.masters import linked_master
from dist_subspace.placement.deepspeed.shards import is_partitioned


def master_fragments(parameter: Any) -> tuple[dict[str | None, Tensor], int]:
    """Local, below stage 3: what this rank's optimizer holds of the parameter, flat, by the name of the moment (None: the
    fp32 master), and the place of the first element in the whole; nothing where other ranks hold it all. At stage 0 that is
    the master of a 16-bit engine alone (`link_masters`).

    Uses `_hp_mapping`, whose fragments are views of what the optimizer works on.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        master = linked_master(parameter)
        return ({} if master is None else {None: master.data.view(-1)}), 0
    return {None: mapping.hp_fragment, **(mapping.optim_fragment or {})}, mapping.lp_fragment_address.start


def has_fragments(parameter: Any) -> bool:
    """Whether ZeRO keeps pieces of a flat master for the parameter (`_hp_mapping` at stages 1 and 2)."""
    return hasattr(parameter, "_hp_mapping")


def is_bucketed(parameter: Any) -> bool:
    """Whether an optimizer of ZeRO's stages 1 and 2 has taken the parameter, whose gradients it adds up as they come
    (`param_idx_in_group`, which no other stage sets)."""
    return hasattr(parameter, "param_idx_in_group")


def forget_moments(parameter: Any) -> None:
    """`link_moments` then looks again."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        mapping.optim_fragment = {}


def link_moments(parameter: Any, states: Mapping[Tensor, Any]) -> None:
    """Local, stages 1 and 2: let DeepSpeed find the parameter's moments in the inner optimizer's state.

    It links those of every group when the first group has made its first step (`_lazy_init_hp_params_optimizer_state`, called
    in `_optimizer_step`), and then the other groups have none: their `optim_fragment` stays empty for good.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None or mapping.optim_fragment:
        return
    memory = mapping.hp_fragment.untyped_storage().data_ptr()
    for flat, state in states.items():
        if flat.untyped_storage().data_ptr() == memory:
            mapping.set_optim_state_fragment(flat, state)


def optimized_tensor(parameter: Any) -> Tensor | None:
    """Local: a tensor of the memory that the inner optimizer updates for this parameter on this rank; None where it updates
    nothing of it. At stage 3 `fp32_partitioned_groups_flat` of the parameter's sub-group (`grad_position`), at 1 and 2 the
    master's fragment, else the parameter."""
    if is_partitioned(parameter):
        optimizer = getattr(parameter, "_z3_optimizer", None)
        if optimizer is None:
            return None
        group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[group]
        return flat
    if has_fragments(parameter):
        return master_fragments(parameter)[0].get(None)
    master = linked_master(parameter)
    updated: Tensor = parameter if master is None else master
    return updated
