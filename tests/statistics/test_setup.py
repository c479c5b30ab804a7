"""Statistics of frozen matrices: the same on any number of ranks, made once, found again, split like weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_subspace import SubspaceConfig, attach, load_frozen
from dist_subspace.atomic_files import StorageError
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import is_partitioned
from dist_subspace.placement.tensors import checksums, full_numel, gathered, kept_bytes
from dist_subspace.statistics import kept_files
from dist_subspace.statistics.cache import FactorCache
from dist_subspace.subspace import SubspaceLinear, attached
from tests.matrix import tiny
from tests.ranks import run_on_ranks, run_once_on_ranks
from tests.tiny_models import save_odd, tiny_model

METHODS = ("pissa", "milora", "svdiff", "spectral-additive", "dora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_odd(tmp_path_factory.mktemp("statistics"), "llama")


def attached_model(
    folder: str, method: str, stage: int | None, storage: str = "nf4", cache: str | None = None
) -> nn.Module:
    config = None if stage is None else tiny.ds_config(stage, world_size=world().size)
    model = load_frozen(folder, storage=storage, deepspeed=config, dtype="float32", device="cpu")
    uses_rank = method not in ("svdiff",)
    return attach(model, SubspaceConfig(method=method, rank=3 if uses_rank else None), cache=cache)


def own_frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the method's parts froze beside their bases."""
    found = {}
    for name in attached(model).layers:
        part = model.get_submodule(name)
        assert isinstance(part, SubspaceLinear)
        bases = {id(p) for p in part.base.parameters()} | ({id(part.bias)} if part.bias is not None else set())
        found |= {
            f"{name}.{own}": p for own, p in part.named_parameters() if not p.requires_grad and id(p) not in bases
        }
    return found


def settled_on_a_rank(folder: str, method: str, stage: int, cache: str | None = None) -> dict[str, Any]:
    """What this rank decomposed, whether its factors are split, and their whole values."""
    made = watch_decompositions(method)
    model = attached_model(folder, method, stage, cache=cache)
    frozen = own_frozen(model)
    split = all(is_partitioned(p) for p in frozen.values())
    shards = all(kept_bytes(p) == -(-full_numel(p) // world().size) * p.element_size() for p in frozen.values())
    with gathered(frozen.values()):
        values = {name: p.detach().clone() for name, p in frozen.items()}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    made.stop()
    return {"made": made.names, "split": split, "shards": shards, "values": values, "trained": trained}


class watch_decompositions:
    """Counts the decompositions that really run in this process."""

    def __init__(self, method: str) -> None:
        from dist_subspace.subspace import method_class

        self.names: list[tuple[int, ...]] = []
        self.kind: Any = method_class(method)
        self.original = self.kind.decompose

        def counting(part: Any, weight: Any) -> dict[str, Tensor]:
            self.names.append(tuple(weight.matrix.shape))
            return self.original(part, weight)

        self.kind.decompose = counting

    def stop(self) -> None:
        self.kind.decompose = self.original


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work_and_all_come_to_what_one_comes_to(method: str, ranks: int, folder: str) -> None:
    alone = attached_model(folder, method, None)
    expected = {name: p.detach() for name, p in own_frozen(alone).items()}
    trained = {n: p.detach() for n, p in alone.named_parameters() if p.requires_grad}
    layers = len(attached(alone).layers)
    found = run_on_ranks(ranks, settled_on_a_rank, folder, method, 3)
    shares = [len(rank["made"]) for rank in found]
    assert sum(shares) == layers and max(shares) - min(shares) <= 1
    for rank in found:
        assert rank["split"] and rank["shards"]
        assert rank["values"].keys() == expected.keys()
        assert all(torch.equal(rank["values"][name], expected[name]) for name in expected)
        assert all(torch.equal(rank["trained"][name], trained[name]) for name in trained)


def test_replicated_weights_give_replicated_factors(folder: str) -> None:
    for rank in run_on_ranks(2, settled_on_a_rank, folder, "pissa", 1):
        assert not rank["split"] and rank["values"]


@pytest.mark.parametrize("method", ["pissa", "dora"])
def test_a_second_start_finds_them_at_any_number_of_ranks(method: str, folder: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "factors")
    first = run_on_ranks(2, settled_on_a_rank, folder, method, 3, cache)
    files = sorted(Path(cache).iterdir())
    assert len(files) == sum(len(rank["made"]) for rank in first)
    for ranks, stage in ((2, 3), (3, 3), (2, 0)):
        for rank in run_on_ranks(ranks, settled_on_a_rank, folder, method, stage, cache):
            assert rank["made"] == []
            assert all(torch.equal(rank["values"][n], first[0]["values"][n]) for n in first[0]["values"])
    assert sorted(Path(cache).iterdir()) == files


def test_what_is_found_is_what_is_used(folder: str, tmp_path: Path) -> None:
    cache = tmp_path / "factors"
    attached_model(folder, "pissa", None, cache=str(cache))
    for file in cache.iterdir():
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    before = own_frozen(attached_model(folder, "pissa", None))
    after = own_frozen(attached_model(folder, "pissa", None, cache=str(cache)))
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("method", ["svdiff", "dora"])
def test_no_file_stays_in_memory_because_a_tensor_of_it_is_kept(method: str, folder: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "factors")
    attached_model(folder, method, None, cache=cache)
    found = attached_model(folder, method, None, cache=cache)
    assert attached(found).layers
    assert cache not in Path("/proc/self/maps").read_text()


def test_another_storage_rank_or_method_does_not_find_them(folder: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "factors")
    attached_model(folder, "pissa", None, cache=cache)
    first = set(Path(cache).iterdir())
    attached_model(folder, "pissa", None, storage="int8", cache=cache)
    second = set(Path(cache).iterdir())
    attached_model(folder, "milora", None, cache=cache)
    third = set(Path(cache).iterdir())
    assert len(third) == 2 * len(second) - len(first) == 3 * len(first)


def test_a_damaged_file_counts_as_none(folder: str, tmp_path: Path) -> None:
    cache = tmp_path / "factors"
    expected = own_frozen(attached_model(folder, "pissa", None, cache=str(cache)))
    victim = next(iter(cache.iterdir()))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    again = own_frozen(attached_model(folder, "pissa", None, cache=str(cache)))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert victim.read_bytes() == whole


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses what a full disk would refuse: bytes beyond `size` in any file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".key.partial").write_text("left by a process that was killed")
    with pytest.raises(StorageError, match=r"key\.safetensors could not be written \(.*File too large.* MiB free\)"):
        with files_of_at_most(4096):
            FactorCache(tmp_path).write("key", "layer", {"U": torch.ones(2**16)})
    assert list(tmp_path.iterdir()) == []


def test_kept_files_name_a_file_and_its_hash_for_each_layer(folder: str, tmp_path: Path) -> None:
    model = attached_model(folder, "pissa", None, cache=str(tmp_path))
    kept = kept_files(model, tmp_path)
    assert set(kept) == set(attached(model).layers)
    assert all((tmp_path / entry["file"]).exists() and len(entry["sha256"]) == 64 for entry in kept.values())
    assert kept_files(attached_model(folder, "dora", None, cache=str(tmp_path)), tmp_path) == {}


def test_a_kept_file_is_read_once_in_a_models_life(folder: str, tmp_path: Path) -> None:
    model = attached_model(folder, "pissa", None, cache=str(tmp_path))
    kept = kept_files(model, tmp_path)
    for entry in kept.values():
        save_file({k: t + 1 for k, t in load_file(tmp_path / entry["file"]).items()}, tmp_path / entry["file"])
    assert kept_files(model, tmp_path) == kept
    again = kept_files(attached_model(folder, "pissa", None, cache=str(tmp_path)), tmp_path)
    assert again.keys() == kept.keys() and all(again[name]["sha256"] != kept[name]["sha256"] for name in kept)


def sums_on_a_rank(folder: str, stage: int, storage: str) -> list[int]:
    model = load_frozen(folder, storage=storage, deepspeed=tiny.ds_config(stage, world_size=world().size), device="cpu")
    return checksums([[p] for p in model.parameters()])


@pytest.mark.parametrize("storage", ["nf4", "bf16"])
def test_a_weights_fingerprint_is_the_same_however_it_is_split(storage: str, folder: str) -> None:
    found = [
        run_on_ranks(ranks, sums_on_a_rank, folder, stage, storage)[-1] for ranks, stage in ((2, 3), (3, 3), (2, 0))
    ]
    assert found[0] == found[1] == found[2] and len(set(found[0])) > len(found[0]) // 2


def test_a_fingerprint_sees_one_changed_bit() -> None:
    weight = nn.Parameter(torch.randn(7, 5), requires_grad=False)
    before = checksums([[weight]])
    weight.data.view(torch.int32)[3, 2] ^= 1
    assert checksums([[weight]]) != before


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"method": "svdiff"}, [{"top_k": 2}, {"top_k": 3}]),
        (
            {"method": "pissa", "rank": 3},
            [{"svd": "exact"}, {"residual": "fold"}, {"residual": "fold", "iterations": 2}],
        ),
        ({"method": "lora", "rank": 3}, [{"iterations": 2}, {"iterations": 3}]),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_an_option_that_a_statistic_depends_on_is_in_the_name_of_its_file_and_no_other(
    config: dict[str, Any], changes: list[dict[str, Any]], folder: str, tmp_path: Path
) -> None:
    own = {"init": "loftq"} if config["method"] == "lora" else {}

    def files(**options: Any) -> int:
        chosen = SubspaceConfig(**config, target_modules=["layers.0.self_attn.q_proj"], options={**own, **options})
        attach(load_frozen(folder, storage="nf4", device="cpu"), chosen, cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    found = [files(), *(files(**options) for options in changes)]
    assert found == list(range(1, len(found) + 1))
    others = {
        "svdiff": {"strength": 1.0},
        "pissa": {"power": 1, "reduction": "sum"},
        "lora": {"lr_ratio": 4.0, "power": 1},
    }
    assert files(**others[config["method"]]) == len(found)


def of_one_layer(folder: str, method: str, cache: Path, **how: Any) -> nn.Module:
    config = SubspaceConfig(
        method=method, rank=3, target_modules=["layers.0.self_attn.q_proj"], **how.pop("config", {})
    )
    return attach(load_frozen(folder, storage="fp32", device="cpu"), config, cache=cache, **how)


@pytest.mark.parametrize("method", ["pissa", "svdiff", "spectral-additive", "spectral-rotational"])
def test_frozen_factors_are_held_in_the_type_of_the_computation(method: str, folder: str) -> None:
    """Twice the bytes else: of svdiff's, more than the weights have."""
    model = load_frozen(folder, storage="nf4", dtype="bfloat16", device="cpu")
    config = SubspaceConfig(method=method, rank=None if method == "svdiff" else 3, target_modules=["v_proj"])
    frozen = own_frozen(attach(model, config))
    assert frozen and {p.dtype for p in frozen.values()} == {torch.bfloat16}


@pytest.mark.parametrize("residual", ["stacked", "fold"])
def test_a_file_that_lacks_a_factor_is_named(residual: str, folder: str, tmp_path: Path) -> None:
    config = {"config": {"options": {"residual": residual}}}
    of_one_layer(folder, "pissa", tmp_path, **config)
    (file,) = tmp_path.iterdir()
    save_file({"lora_A0": load_file(file)["lora_A0"]}, file)
    with pytest.raises(
        UsageError, match=rf"{file.name} lacks 'lora_B0' of model\.layers\.0.*; delete it, and it is made"
    ):
        of_one_layer(folder, "pissa", tmp_path, **config)


def test_factors_that_come_with_an_adapter_are_kept_and_others_of_that_name_refused(
    folder: str, tmp_path: Path
) -> None:
    first = of_one_layer(folder, "spectral-additive", tmp_path / "own")
    (layer,) = attached(first).layers
    given = {layer: {name: t.clone() for name, t in first.get_submodule(layer).factor_tensors().items()}}
    of_one_layer(folder, "spectral-additive", tmp_path / "new", factors=given)
    (file,) = (tmp_path / "new").iterdir()
    held = load_file(file)
    assert held.keys() == given[layer].keys() and all(torch.equal(held[n], t) for n, t in given[layer].items())
    of_one_layer(folder, "spectral-additive", tmp_path / "own", factors=given)  # the same ones
    given[layer]["spectral_S"][1] += 1
    with pytest.raises(UsageError, match=r"holds other factors of .* than the adapter that the run begins with"):
        of_one_layer(folder, "spectral-additive", tmp_path / "own", factors=given)


def failing_on_one_rank(folder: str) -> str:
    from dist_subspace.subspace import method_class

    kind: Any = method_class("pissa")
    original = kind.decompose

    def breaks(part: Any, weight: Any) -> dict[str, Tensor]:
        if world().rank == 1:
            raise UsageError("no singular values on this rank")
        return original(part, weight)

    kind.decompose = breaks
    try:
        attached_model(folder, "pissa", 3)
    except UsageError as error:
        return str(error)
    return "went on"


def test_a_rank_that_fails_does_not_leave_the_others_waiting(folder: str) -> None:
    reports = run_once_on_ranks(2, failing_on_one_rank, folder)
    assert [report.result for report in reports] == ["no singular values on this rank"] * 2


def test_whatever_a_statistic_is_made_from_is_in_the_name_of_its_file(tmp_path: Path) -> None:
    """Each of these has files of its own for every layer; what no decomposition depends on has not."""
    cache, model = tmp_path / "factors", Path(save_odd(tmp_path / "model", "llama"))
    target = "model.layers.0.self_attn.q_proj"

    def files(**changed: Any) -> int:
        chosen: dict[str, Any] = {"method": "pissa", "rank": 3, "alpha": 3, "target_modules": [target], **changed}
        attach(load_frozen(model, storage="fp32", device="cpu"), SubspaceConfig(**chosen), cache=cache)
        return len(list(cache.iterdir()))

    assert files() == 1
    assert [files(options={"residual": kind}) for kind in ("fold", "stacked", "fold")][1:] == [2, 2]
    found = [2]
    for changed in ({"rank": 4}, {"alpha": 6}, {"seed": 1}, {"method": "milora"}):
        found.append(files(**changed))
        assert found[-1] == found[-2] + 1, changed
    weights = load_file(model / "model.safetensors")
    weights[f"{target}.weight"].view(torch.int32)[0, 0] ^= 1
    other = "model.layers.1.self_attn.q_proj"
    weights[f"{other}.weight"] = weights[f"{target}.weight"].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert files() == found[-1] + 1
    target = other  # of equal weights
    assert files() == found[-1] + 2


STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def on_experts(folder: str, method: str, cache: str, stage: int = 3) -> dict[str, Any]:
    """How many experts this rank took apart, and the values of one stack's part."""
    made = watch_decompositions(method)
    model = load_frozen(
        folder, storage="nf4", dtype="float32", deepspeed=tiny.ds_config(stage, world_size=world().size)
    )
    attach(model, SubspaceConfig(method=method, rank=2, target_parameters=STACKS), cache=cache)
    made.stop()
    part = model.get_submodule("model.layers.1.mlp.experts.down_proj")
    with gathered(part.parameters(recurse=False)):
        values = {n: t.detach().clone() for n, t in (*part.named_parameters(recurse=False), *part.named_buffers())}
    return {"made": len(made.names), "values": values}


@pytest.mark.parametrize("method", ["pissa", "dora"])
def test_a_stack_of_experts_is_taken_apart_by_one_rank_and_has_one_file(method: str, tmp_path: Path) -> None:
    folder, cache = str(tmp_path / "mixture"), str(tmp_path / "factors")
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    tiny_model("MixtralForCausalLM", config_name="MixtralConfig", **sizes).save_pretrained(folder)
    first = run_on_ranks(2, on_experts, folder, method, cache)
    assert [rank["made"] for rank in first] == [10, 10]  # two of four stacks of five experts
    assert len(list(Path(cache).iterdir())) == 4
    for ranks, stage in ((1, 0), (2, 3)):
        for rank in run_on_ranks(ranks, on_experts, folder, method, cache, stage):
            assert rank["made"] == 0 and rank["values"].keys() == first[0]["values"].keys()
            assert all(torch.equal(tensor, first[0]["values"][name]) for name, tensor in rank["values"].items())
