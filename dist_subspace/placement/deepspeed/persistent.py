"""Trained parameters that ZeRO-3 keeps whole between steps.

Read against deepspeed 0.19.8 (`runtime/zero/parameter_offload.py`, `runtime/zero/stage3.py`). What each
function relies on is in its docstring; tests/placement/deepspeed/test_zero.py fails when it moves.
"""

from __future__ import annotations

from typing import Any

from dist_subspace.placement.deepspeed.secondary import forget
from dist_subspace.placement.deepspeed.shards import is_partitioned


def keep_trainables_whole(engine: Any) -> None:
    """Mark the trained parameters persistent (`ds_persist`, `persistent_parameters`): gathered once after a step, and not
    at each use. They are few; thresholds on their size would also decide about the frozen ones."""
    persistent = getattr(getattr(engine, "optimizer", None), "persistent_parameters", None)
    if persistent is None:
        return
    known = {id(p) for p in persistent}
    for parameter in engine.module.parameters():
        if parameter.requires_grad and is_partitioned(parameter) and id(parameter) not in known:
            parameter.ds_persist = True
            persistent.append(parameter)
    if persistent:
        _gather_in_one_call(persistent[0])


def _gather_in_one_call(first: Any) -> None:
    """After a step DeepSpeed asks the first persistent parameter to gather them all (`all_gather(list)`), which sends one
    collective a parameter; `all_gather_coalesced`, which gathers a module's parameters, sends one for all. It reads second
    shards, which are those of before the step."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    one_by_one = first.all_gather

    def together(param_list: list[Any] | None = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is None or async_op:
            return one_by_one(param_list, async_op=async_op, hierarchy=hierarchy)
        absent = [p for p in param_list if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            forget(absent)
            first.all_gather_coalesced(absent).wait()
        return None

    first.all_gather = together
