"""The only file that touches what DeepSpeed's ZeRO keeps on parameters and engines.

Read against deepspeed 0.19.8 (`runtime/zero/partition_parameters.py`, `parameter_offload.py`, `utils/tensor_fragment.py`,
`utils/z3_leaf_module.py`). What each function relies on is in its docstring; tests/placement/test_zero.py fails when it moves.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_subspace.placement.collectives import is_distributed, message_device, world
from dist_subspace.placement.masters import linked_master
from dist_subspace.placement.process_group import agreed_device
from dist_subspace.placement.reuse import block_lists, blocks, called_once


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has split the parameter over ranks (`ds_id`)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, split or not (`ds_shape`)."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


def full_numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if is_partitioned(parameter) else parameter.numel()


def kept_bytes(parameter: Any) -> int:
    """Bytes of the parameter that this rank keeps between steps: its shard, or the whole."""
    if is_partitioned(parameter):
        shard = parameter.ds_tensor
        return 0 if shard is None else shard.numel() * shard.element_size()
    return parameter.numel() * parameter.element_size()


def gathered_bytes(parameter: Any) -> int:
    """Bytes of a split parameter that are gathered on this rank at this moment, beside its shard."""
    if not is_partitioned(parameter) or parameter.data.numel() <= 1:
        return 0
    shared = parameter.ds_tensor is not None and parameter.data.data_ptr() == parameter.ds_tensor.data_ptr()
    return 0 if shared else parameter.data.numel() * parameter.data.element_size()


def resident_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters that lie on this rank at this moment: shards, and what is gathered; each counted once."""
    unique = {id(p): p for p in parameters}.values()
    return sum(kept_bytes(p) + gathered_bytes(p) for p in unique)


def own_shard(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that is split as the partitioned parameter is: flat, zeros after the end.

    Uses `ds_process_group`, the ranks that the parameter is split over, and the padded length of `ds_tensor`.
    """
    length = parameter.ds_tensor.numel()
    start = min(length * torch.distributed.get_rank(parameter.ds_process_group), whole.numel())
    part = whole.reshape(-1)[start : start + length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))


class Partitioner:
    """Splits parameters over the ranks as they are made, one at a time.

    Uses `Init._convert_to_deepspeed_param` and the `partition` method that it puts on the parameter, with the real whole
    tensor in hand (never a placeholder). `Init`'s own way broadcasts rank 0's bytes first; every rank has read the same
    file, so nothing is sent.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # Init reads it from the environment
        minimal = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": _without_auto(config["zero_optimization"])}
        self._init = deepspeed.zero.Init(config_dict_or_path=minimal)
        self.device = self._init.local_device

    def place(self, parameter: nn.Parameter) -> None:
        """Keep this rank's shard of a whole parameter, and let the rest go."""
        if is_partitioned(parameter):
            return
        parameter.data = parameter.data.to(self.device)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Modules are made plain although the caller is inside `zero.Init` (`shutdown_init_context`, as DeepSpeed's engine does)."""
    split: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    active = getattr(getattr(split, "top_level_context", None), "patched", False)
    if active:
        split.shutdown_init_context()
    try:
        yield
    finally:
        if active:
            split.restore_init_context()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Collective where parameters are split: within the block they are whole, and only read. What is whole between steps
    (`keep_trainables_whole`) is left as it is: DeepSpeed would release it at the end of the block."""
    import deepspeed

    split = [p for p in parameters if is_partitioned(p) and not _is_whole(p)]
    with deepspeed.zero.GatheredParameters(split) if split else nullcontext():
        yield


def is_split(model: nn.Module) -> bool:
    """Whether the model's forward needs other ranks: a parameter is split over several, and is not whole here now."""
    split = (p for p in model.parameters() if is_partitioned(p) and not _is_whole(p))
    return any(torch.distributed.get_world_size(p.ds_process_group) > 1 for p in split)  # type: ignore[attr-defined]


def is_registered(model: nn.Module) -> bool:
    """Whether an engine gathers the model's parameters when its modules are called (`ds_id` of a module)."""
    return hasattr(model, "ds_id")


def _is_whole(parameter: Any) -> bool:
    """Whether a split parameter is gathered on every rank at this moment (`ds_status`)."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return parameter.ds_status is ZeroParamStatus.AVAILABLE


@contextmanager
def rewritten(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Collective where parameters are split: within the block they are whole; what rank 0 writes becomes everyone's."""
    import deepspeed

    split = [p for p in parameters if is_partitioned(p)]
    with deepspeed.zero.GatheredParameters(split, modifier_rank=0) if split else nullcontext():
        yield


def mark_leaf_blocks(model: nn.Module) -> list[str]:
    """Let ZeRO-3 gather a decoder block at once (`_z3_leaf`): half the gathers under activation checkpointing.

    Blocks are the entries of the model's `nn.ModuleList`s that are not inside another; those that a forward does not call
    exactly once are no leaves. Returns the leaves' class names.
    """
    from deepspeed.utils import set_z3_leaf_module

    leaves = [block for name, stack in block_lists(model).items() if called_once(model, name) for block in stack]
    for block in leaves:
        if not hasattr(block, _INPUT_HOOK):
            hook = block.register_forward_pre_hook(_ask_for_input_gradients, with_kwargs=True, prepend=True)
            setattr(block, _INPUT_HOOK, hook)
        set_z3_leaf_module(block, True)
    return sorted({type(block).__name__ for block in leaves})


_INPUT_HOOK = "_dist_subspace_input_hook"


def _ask_for_input_gradients(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """DeepSpeed reduces a leaf module's gradients in a full backward hook, which fires when the gradient of the module's
    input is there. Behind frozen embeddings the first block's input asks for none: the hook then fires before the adapter
    has its gradients, and zeros are reduced in their place."""
    if not (block.training and torch.is_grad_enabled() and any(is_partitioned(p) for p in block.parameters())):
        return
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    if inputs and not any(x.requires_grad for x in inputs):
        inputs[0].requires_grad_(True)


def unmark_leaf_blocks(model: nn.Module) -> None:
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks(model):
        set_z3_leaf_module(block, False)


def largest_block_numel(model: nn.Module) -> int:
    """Stored frozen elements (packed bytes count as one each) of the largest block: what the gather limits are sized by.
    Trained parameters stay whole between steps, and are not gathered with it."""
    frozen = [[full_numel(p) for p in block.parameters() if not p.requires_grad] for block in blocks(model)]
    return max((sum(numels) for numels in frozen), default=0)


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
    collective a parameter; `all_gather_coalesced`, which gathers a module's parameters, sends one for all."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    one_by_one = first.all_gather

    def together(param_list: list[Any] | None = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is None or async_op:
            return one_by_one(param_list, async_op=async_op, hierarchy=hierarchy)
        absent = [p for p in param_list if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            first.all_gather_coalesced(absent).wait()
        return None

    first.all_gather = together


def release_gathered(engine: Any) -> None:
    """Let go of frozen weights that a forward without backward left gathered (`empty_partition_cache`)."""
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """A section of a stock JSON without the values that only a trainer can resolve."""
    return {key: value for key, value in copy.deepcopy(section).items() if value != "auto"}


_PARTITIONERS: WeakKeyDictionary[nn.Module, Partitioner] = WeakKeyDictionary()


def remember_partitioner(model: nn.Module, partitioner: Partitioner) -> None:
    """What splits the model's weights splits what is added to it later."""
    _PARTITIONERS[model] = partitioner


def split_like(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Local, alike on every rank: where the model's parameters are split, split these new whole ones too."""
    if not any(is_partitioned(p) for p in model.parameters()):
        return
    partitioner = _PARTITIONERS.get(model)
    if partitioner is None:
        partitioner = _PARTITIONERS[model] = Partitioner({"zero_optimization": {"stage": 3}})
    for parameter in parameters:
        partitioner.place(parameter)


def gather_to(parameter: Any, rank: int) -> Tensor | None:
    """Collective where the parameter is split: the whole of it on one rank, None on the others.

    Uses `ds_tensor`, `ds_numel`, `ds_shape` and `ds_process_group`; `all_gather`, DeepSpeed's own way, would put the whole on
    every rank. Shards that were offloaded travel over the device that the process group can send from.
    """
    if not is_partitioned(parameter):
        return parameter.data if world().rank == rank else None
    shard = parameter.ds_tensor.data.to(agreed_device())
    group = parameter.ds_process_group
    if torch.distributed.get_world_size(group) == 1:
        return shard[: parameter.ds_numel].view(parameter.ds_shape) if world().rank == rank else None
    own = torch.distributed.get_rank() == rank
    parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))] if own else None
    torch.distributed.gather(shard, parts, dst=rank, group=group)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape) if parts is not None else None


@contextmanager
def lent(wholes: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Local: within the block the parameters hold the given whole tensors, and are only read."""
    before = {parameter: parameter.data for parameter in wholes}
    try:
        for parameter, whole in wholes.items():
            parameter.data = whole
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def overwrite(parameter: Any, whole: Tensor) -> None:
    """Local, alike on every rank: a frozen parameter gets another value; where it is split, this rank's shard of it."""
    if is_partitioned(parameter):
        parameter.ds_tensor.data.copy_(own_shard(parameter, whole.to(parameter.ds_tensor.device)))
    else:
        parameter.data.copy_(whole.view(parameter.shape))


def places(parameter: Any) -> list[tuple[Tensor, int]]:
    """Local: where this rank holds the values that the forward reads, as (flat tensor, its first element's place in the
    whole): the parameter; where it is split the shard, and the whole of it while it is gathered."""
    if not is_partitioned(parameter):
        return [(parameter.data.view(-1), 0)]
    shard = parameter.ds_tensor.data.view(-1)
    found = [(shard, shard.numel() * torch.distributed.get_rank(parameter.ds_process_group))]
    return [*found, (parameter.data.view(-1), 0)] if _is_whole(parameter) else found


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
    if hasattr(parameter, "_hp_mapping"):
        return master_fragments(parameter)[0].get(None)
    master = linked_master(parameter)
    return parameter if master is None else master  # type: ignore[no-any-return]


def checksums(groups: Sequence[Sequence[Any]]) -> list[int]:
    """Collective: a number for each group of parameters, the same however they are split over however many ranks.

    The sum, modulo 2^64, of each stored element's bits times a weight of its place in the whole.
    """
    sums = torch.tensor([sum(map(_weighted_bits, group)) % 2**63 for group in groups], dtype=torch.int64)
    if is_distributed() and any(is_partitioned(p) for group in groups for p in group):
        sums = sums.to(message_device())
        torch.distributed.all_reduce(sums)
    return [int(value) % 2**63 for value in sums.tolist()]


_PLACES = 1 << 20  # elements at a time


def _weighted_bits(parameter: Any) -> int:
    """This rank's part of the sum. Elements are read as integers of their own size; padding lies beyond the whole."""
    split = is_partitioned(parameter)
    held = (parameter.ds_tensor.data if split else parameter.data).reshape(-1)
    start = held.numel() * torch.distributed.get_rank(parameter.ds_process_group) if split else 0
    bits = held.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()])
    length = max(0, min(held.numel(), full_numel(parameter) - start))
    total = 0
    for first in range(0, length, _PLACES):
        piece = bits[first : min(first + _PLACES, length)].long()
        places = torch.arange(start + first, start + first + piece.numel(), device=piece.device)
        total += int((piece * ((places * 2654435761 + 40503) & 0x7FFFFFFF)).sum())
    return total
