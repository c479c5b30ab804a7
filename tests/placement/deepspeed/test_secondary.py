"""Second shards inside a node (ZeRO++'s hierarchical partitioning): four ranks as two nodes of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.secondary import check_partition_size, second_shard
from dist_subspace.placement.edits import apply_edits
from dist_subspace.placement.tensors import full_numel, full_shape, gather_to, kept_bytes
from dist_subspace.storage import FrozenLinear
from dist_subspace.subspace import named_trainables, trainable_parameters
from dist_subspace.subspace.core.schedule import Edit
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd

RANKS, NODE = 4, 2
LORA = SubspaceConfig(method="lora", rank=3)
STORAGES = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "int8": ("int8", False), "bf16": ("bf16", False)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("models"), "llama")


class Compared:
    """Whether every tensor of a frozen operator is, where it multiplies, what an unsplit model holds."""

    def __init__(self, model: nn.Module, right: dict[str, Tensor]) -> None:
        self.seen = {"forward": 0, "backward": 0}
        self.wrong: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, FrozenLinear):
                self._watch(name, module, right)

    def _watch(self, name: str, module: FrozenLinear, right: dict[str, Tensor]) -> None:
        for when, products in (
            ("forward", ("product", "gated_product")),
            ("backward", ("transposed_product", "gated_gradients")),
        ):
            for product in products:
                setattr(module, product, self._seen(name, module, right, when, getattr(module, product)))

    def _seen(
        self, name: str, module: FrozenLinear, right: dict[str, Tensor], when: str, product: Callable[..., Any]
    ) -> Callable[..., Any]:
        def compared(*args: Any) -> Any:
            self.seen[when] += 1
            for own, parameter in module.named_parameters(recurse=False):
                if not torch.equal(parameter.detach(), right[f"{name}.{own}"]):
                    self.wrong.append(f"{name}.{own} in {when}")
            return product(*args)

        return compared


def trained(
    folder: str, storage: str, double: bool, node: int, subspace: SubspaceConfig = LORA, **zero: Any
) -> dict[str, Any]:
    """Three steps: what the products saw, where the shards are, and the adapter that came out."""
    size = world().size
    config = tiny.ds_config(3, world_size=size, zero_hpz_partition_size=node, **zero)
    kind: dict[str, Any] = {"storage": storage, "double_quant": double}
    kind["dtype"] = "bfloat16" if storage == "bf16" else "float32"
    attached = [
        attach(load_frozen(folder, deepspeed=where, device="cpu", **kind), subspace) for where in (config, None)
    ]
    model, alone = attached[0].train(), dict(attached[1].named_parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    config["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in trainable_parameters(attached[1]))
    engine = tiny.make_engine(model, config)
    frozen = tiny.frozen_parameters(model)
    compared = Compared(model, {name: alone[name].detach() for name in frozen})
    losses = [tiny.train_step(engine, tiny.own_batch(s, world().rank, size)) for s in range(tiny.STEPS)]
    trainables = named_trainables(model)
    adapter = {name: gather_to(p, 0) for name, p in trainables.items()}
    found = {
        "losses": losses,
        "seen": compared.seen,
        "wrong": compared.wrong,
        "seconds": [name for name, p in frozen.items() if second_shard(p) is not None],
        "shards": [name for name, p in frozen.items() if not _is_cut(p, alone[name].detach(), node)],
        "kept": sum(map(kept_bytes, frozen.values())),
        "trained seconds": [name for name, p in trainables.items() if second_shard(p) is not None],
        "adapter": {name: None if whole is None else whole.clone() for name, whole in adapter.items()},
        "stale": [n for n, p in trainables.items() if adapter[n] is not None and not torch.equal(p.data, adapter[n])],  # type: ignore[arg-type]
    }
    engine.destroy()
    return found


def _is_cut(parameter: nn.Parameter, whole: Tensor, node: int) -> bool:
    """The second shard is the rank's part of the whole among those of its node."""
    second = second_shard(parameter)
    if second is None:
        return node == 1
    shard, start = second
    part = whole.reshape(-1)[start : start + shard.numel()]
    return start == shard.numel() * (world().rank % node) and torch.equal(shard[: part.numel()], part)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_in_forward_and_backward_are_the_files_and_the_adapter_is_zero_3s(llama: str, storage: str) -> None:
    plain = run_on_ranks(RANKS, trained, llama, *STORAGES[storage], 1)
    near = run_on_ranks(RANKS, trained, llama, *STORAGES[storage], NODE)
    for one, two in zip(plain, near, strict=True):
        assert two["wrong"] == [] and min(two["seen"].values()) > 0 and two["seen"] == one["seen"]
        assert one["seconds"] == [] and len(two["seconds"]) > 0 and two["shards"] == []
        assert two["trained seconds"] == [] and two["stale"] == []
        assert two["kept"] == pytest.approx(one["kept"] * (1 + RANKS / NODE), rel=0.05)
        assert two["losses"] == one["losses"]
    assert_same_adapter(plain[0], near[0])


def assert_same_adapter(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit for bit: the same bytes are multiplied, and gradients are summed in the same order."""
    assert one["adapter"].keys() == two["adapter"].keys()
    assert [name for name, tensor in one["adapter"].items() if not torch.equal(tensor, two["adapter"][name])] == []


def test_weights_that_a_method_replaces_are_replaced_in_second_shards_too(llama: str) -> None:
    folded = SubspaceConfig(method="pissa", rank=3, options={"residual": "fold"})
    plain = run_on_ranks(RANKS, trained, llama, "nf4", False, 1, folded)
    near = run_on_ranks(RANKS, trained, llama, "nf4", False, NODE, folded)
    assert all(rank["wrong"] == rank["shards"] == [] for rank in (*plain, *near))
    assert_same_adapter(plain[0], near[0])


def test_second_shards_lie_on_the_cpu_where_weights_are_offloaded_there(llama: str) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    for rank in run_on_ranks(RANKS, with_offload, llama, offload):
        assert rank["wrong"] == rank["shards"] == rank["stale"] == [] and rank["seconds"]


def with_offload(folder: str, offload: dict[str, Any]) -> dict[str, Any]:
    return trained(folder, "nf4", False, NODE, **offload)


def edited_before_a_forward(folder: str) -> tuple[list[str], list[bool]]:
    """Trained parameters that have second shards, and whether each forward reads the value that one was given."""
    config = tiny.ds_config(3, world_size=world().size, zero_hpz_partition_size=NODE)
    model = attach(load_frozen(folder, storage="nf4", dtype="float32", deepspeed=config), LORA)
    engine = tiny.make_engine(model, config | {"gradient_clipping": 0.0})
    trainables = named_trainables(model)
    seconds = [name for name, p in trainables.items() if second_shard(p) is not None]
    name, parameter = next(iter(trainables.items()))
    read: list[bool] = []
    model.get_submodule(name.rpartition(".")[0]).register_forward_hook(
        lambda *call: read.append(parameter.numel() == full_numel(parameter) and bool((parameter == 7.0).all()))
    )
    apply_edits([Edit(parameter, torch.ones(full_shape(parameter), dtype=torch.bool), 7.0)])
    engine.eval()
    engine(input_ids=tiny.own_batch(0, world().rank, world().size), use_cache=False)
    engine.destroy()
    return seconds, read


def test_a_trained_parameter_has_no_second_shard_and_an_edit_reaches_the_next_forward(llama: str) -> None:
    assert run_on_ranks(RANKS, edited_before_a_forward, llama) == [([], [True])] * RANKS


# Another's split, and several models in a process.


def moved_twice(folder: str) -> dict[str, Any]:
    """DeepSpeed splits the model itself, adapter and all; then another one with plain shards, and with second ones, is made."""
    from transformers import AutoModelForCausalLM

    size = world().size
    config = tiny.ds_config(3, world_size=size, zero_hpz_partition_size=NODE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = attach(model, LORA).train()
    config["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in trainable_parameters(model))
    engine = tiny.make_engine(model, config)
    start = {name: whole for name, p in named_trainables(model).items() if (whole := gather_to(p, 0)) is not None}
    losses = [tiny.train_step(engine, tiny.own_batch(0, world().rank, size)) for _ in range(3)]
    after = {name: whole for name, p in named_trainables(model).items() if (whole := gather_to(p, 0)) is not None}
    stale = [
        name for name, p in named_trainables(model).items() if name in after and not torch.equal(p.data, after[name])
    ]
    engine.destroy()
    sizes = []
    for node in (1, NODE, 1):
        other = load_frozen(
            folder, storage="nf4", dtype="float32", deepspeed=tiny.ds_config(3, zero_hpz_partition_size=node)
        )
        sizes.append(sum(second_shard(p) is not None for p in other.parameters()))
    unmoved = [name for name in after if torch.equal(start[name], after[name])]
    return {"losses": losses, "stale": stale, "unmoved": unmoved, "sizes": sizes}


def test_a_model_that_deepspeed_splits_learns_too_and_others_follow_it(llama: str) -> None:
    for rank in run_on_ranks(RANKS, moved_twice, llama):
        assert rank["stale"] == rank["unmoved"] == []
        assert rank["losses"][2] < rank["losses"][1] < rank["losses"][0]
        assert rank["sizes"][0] == rank["sizes"][2] == 0 < rank["sizes"][1]


def groups_of_two_models(folder: str) -> bool:
    """Whether both gather in the same group: each costs threads and, on a GPU, memory."""
    config = tiny.ds_config(3, zero_hpz_partition_size=NODE)
    models = [load_frozen(folder, storage="nf4", dtype="float32", deepspeed=config) for _ in range(2)]
    groups = [next(model.parameters()).ds_zero_param_process_group for model in models]  # type: ignore[union-attr]
    return groups[0] is groups[1]


def test_a_second_model_uses_the_group_of_the_first(llama: str) -> None:
    assert run_on_ranks(RANKS, groups_of_two_models, llama) == [True] * RANKS


# What is refused.


@pytest.mark.parametrize(
    ("section", "ranks", "reason"),
    [
        (
            {"stage": 2, "zero_hpz_partition_size": 2},
            4,
            "at stage 2, where no weight is split; accepted: stage 3, or 1",
        ),
        ({"stage": 3, "zero_hpz_partition_size": 3}, 4, "is 3, and there are 4 ranks; accepted: 1, or a number"),
        ({"stage": 3, "zero_hpz_partition_size": 4}, 4, "is 4, and there are 4 ranks"),
        (
            {"stage": 3, "zero_hpz_partition_size": 2, "offload_param": {"device": "nvme", "nvme_path": "fast"}},
            4,
            "keeps no second shard on NVMe",
        ),
    ],
)
def test_a_size_that_deepspeed_would_ignore_or_fail_at_is_refused(
    section: dict[str, Any], ranks: int, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        check_partition_size({"zero_optimization": section}, ranks)
    check_partition_size({"zero_optimization": section | {"zero_hpz_partition_size": 1}}, ranks)
    check_partition_size({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, 4)
