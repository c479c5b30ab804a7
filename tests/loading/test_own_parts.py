"""A rank's parts of a split model are those of the whole that bitsandbytes, or torch, makes of the file's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.load import bytes_read
from dist_subspace.notices import heard
from dist_subspace.pages import SMALL
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.secondary import second_shard
from dist_subspace.placement.deepspeed.shards import kept
from dist_subspace.placement.tensors import gathered
from dist_subspace.placement.whole.parameters import kept as whole_kept
from dist_subspace.storage import FrozenLinear, FrozenStack
from dist_subspace.storage.fp8 import quantize
from dist_subspace.storage.raw import to_bytes
from tests.matrix import tiny
from tests.ranks import run_on_ranks
from tests.tiny_models import save_odd, tiny_config, tiny_model

KINDS = ("nf4", "nf4-double", "fp4-double", "int8", "fp8", "bf16")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_odd(folder, family) for family in ("llama", "gpt2")}


def expected_tensors(matrix: Tensor, kind: str, transposed: bool) -> dict[str, Tensor]:
    """What the whole matrix of a file is in a storage: bytes of bitsandbytes' own functions."""
    logical = (matrix.t() if transposed else matrix).contiguous()
    name, _, double = kind.partition("-")
    if name in ("nf4", "fp4"):
        codes, state = reference.quantize_4bit(logical, blocksize=64, quant_type=name, compress_statistics=bool(double))
        tensors = {"codes": to_bytes(codes), "absmax": to_bytes(state.absmax)}
        return tensors | ({"nested_absmax": to_bytes(state.state2.absmax)} if double else {})
    if name == "int8":
        codes, scale, _ = reference.int8_vectorwise_quant(logical.half())
        return {"codes": codes, "scale": to_bytes(scale)}
    if name == "fp8":
        codes, scale = quantize(logical)
        return {"codes": codes.view(torch.int8), "scale": to_bytes(scale)}
    return {"weight": matrix.to(torch.bfloat16)}


def differing_parts(folder: str, kind: str, zero: Mapping[str, Any] = {}, stage: int = 3) -> tuple[list[str], int, int]:
    """The parameters whose part on this rank is another one, how many were compared, and the bytes that were read."""
    name, _, double = kind.partition("-")
    config = tiny.ds_config(stage, world_size=world().size, **zero)
    model = load_frozen(folder, name, double_quant=bool(double), dtype="bfloat16", deepspeed=config)
    file = load_file(Path(folder) / "model.safetensors")
    expected: dict[str, Tensor] = {}
    wrong, pinned = [], zero.get("offload_param", {}).get("pin_memory", False)
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.storage == name and module.origin is not None:
            matrix = file[module.origin.key]
            tensors = expected_tensors(matrix, kind, module.conv1d)
            expected |= {f"{path}.{part}": tensor for part, tensor in tensors.items()}
            if double:
                logical = (matrix.t() if module.conv1d else matrix).contiguous()
                absmax = reference.quantize_4bit(logical, blocksize=64, quant_type=name)[1].absmax
                wrong += [] if module.offset == absmax.mean().item() else [f"{path}.offset"]
    for path, parameter in model.named_parameters():
        whole = expected.get(path)
        if whole is None:
            whole = next(t for key, t in file.items() if path.endswith(key) or key.endswith(path)).to(torch.bfloat16)
        own_shards = (kept if stage == 3 else whole_kept)(parameter), second_shard(parameter)
        for shard, start in filter(None, own_shards):
            own = whole.reshape(-1)[start : start + shard.numel()]
            # What DeepSpeed splits itself ends in whatever its memory held.
            dirty = not pinned and bool(shard[own.numel() :].any())
            if not torch.equal(shard[: own.numel()], own) or dirty:
                wrong.append(path)
        if (second_shard(parameter) is not None) != ("zero_hpz_partition_size" in zero):
            wrong.append(f"{path}: second shard")
    return wrong, len(expected), bytes_read(model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ranks_bytes_are_those_of_the_whole(models: dict[str, str], kind: str, family: str, ranks: int) -> None:
    for wrong, compared, _ in run_on_ranks(ranks, differing_parts, models[family], kind):
        assert wrong == [] and compared >= 8


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "bf16"])
def test_all_ranks_together_read_the_checkpoint_once(kind: str, tmp_path: Path) -> None:
    """Large enough for the blocks and rows at the ranks' borders, which two of them read, to be few."""
    folder = save_larger(tmp_path)
    size = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    facts = run_on_ranks(3, differing_parts, folder, kind)
    assert all(wrong == [] and compared for wrong, compared, _ in facts)
    read = [count for _, _, count in facts]
    assert size <= sum(read) <= 1.1 * size and max(read) < 0.4 * size


def save_larger(folder: Path) -> str:
    """Shards that lie in pages of their own."""
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tiny_model(**sizes, num_key_value_heads=4)
    model.save_pretrained(folder)
    assert max(p.numel() for p in model.parameters()) > 3 * SMALL
    return str(folder)


def test_second_shards_are_parts_of_the_whole_too(tmp_path: Path) -> None:
    folder = save_larger(tmp_path)
    size = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    for wrong, compared, read in run_on_ranks(4, differing_parts, folder, "nf4-double", {"zero_hpz_partition_size": 2}):
        assert wrong == [] and compared
        assert 0.2 * size < read < 0.3 * size, "the second shard comes from the other ranks' first ones"


@pytest.mark.parametrize(("kind", "stage"), [("nf4-double", 0), ("int8", 1), ("bf16", 2)])
def test_where_every_rank_keeps_all_they_read_a_part_each(kind: str, stage: int, tmp_path: Path) -> None:
    folder = save_larger(tmp_path)
    size = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    for wrong, compared, read in run_on_ranks(3, differing_parts, folder, kind, {}, stage):
        assert wrong == [] and compared
        assert 0.3 * size < read < 0.37 * size


# What one rank sees and the others do not.


def refusal(folder: str, dtype: str) -> str | None:
    try:
        load_frozen(folder, "nf4", dtype=dtype, deepspeed=tiny.ds_config(3, world_size=world().size))
    except UsageError as error:
        return str(error)
    return None


def rewritten(folder: str, key: str, places: dict[int, float]) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    for place, value in places.items():
        tensors[key].view(-1)[place] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_ranks_that_see_other_values_beyond_float16_say_the_same(key: str, tmp_path: Path) -> None:
    folder = save_odd(tmp_path, "llama")
    rewritten(folder, key, {-1: 80000.0, 0: -70000.0})
    rewritten(folder, "lm_head.weight", {-1: 9e9})  # comes later
    first, second = run_on_ranks(2, refusal, folder, "float16")
    assert first == second and f"whose {key} has values up to 80,000, which float16 cannot hold" in str(first)
    assert run_on_ranks(2, refusal, folder, "bfloat16") == [None, None]


def cut_short(folder: str) -> str | None:
    """The file loses its end once rank 1 has read its header, as one does that is copied meanwhile."""
    from dist_subspace.loading import load

    opened = load.open_checkpoint

    def open_and_cut(path: Any) -> Any:
        index = opened(path)
        if world().rank == 1:
            copy = Path(path).parent / "cut.safetensors"
            copy.write_bytes((Path(path) / "model.safetensors").read_bytes()[:-2000])
            index.files.update(dict.fromkeys(index.files, copy))
        return index

    load.open_checkpoint = open_and_cut
    try:
        return refusal(folder, "bfloat16")
    finally:
        load.open_checkpoint = opened


def test_a_file_that_one_rank_cannot_read_to_its_end_is_said_by_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, cut_short, save_odd(tmp_path, "llama"))
    assert first == second and "cut.safetensors is cut short: it ends within" in str(first)


@pytest.mark.parametrize("offload", ["cpu", "cpu-pinned"])
def test_shards_in_cpu_memory_are_the_same(offload: str, tmp_path: Path) -> None:
    section = {"device": "cpu", "pin_memory": offload.endswith("pinned")}
    folder = save_larger(tmp_path)
    size = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    for wrong, compared, read in run_on_ranks(2, differing_parts, folder, "nf4-double", {"offload_param": section}):
        assert wrong == [] and compared and read < 0.55 * size


# Tensors that transformers makes of others.

EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
CONVERTED = {
    "one by one": ("MixtralConfig", EXPERTS | {"intermediate_size": 44}),
    "as one tensor": ("GraniteMoeConfig", EXPERTS | {"intermediate_size": 44}),
    "turned": ("GptOssConfig", EXPERTS | {"head_dim": 8, "sliding_window": 8, "intermediate_size": 44}),
}


def save_experts(folder: Path, case: str) -> str:
    name, sizes = CONVERTED[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **sizes)).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def loaded(
    folder: str, storage: str, stage: int | None
) -> tuple[dict[str, Tensor], list[dict[str, float]], list[str], int]:
    """Every parameter, gathered; the plain values of the experts; what was said; bytes that were read. A stack of floats that
    ZeRO-3 splits has a name that is longer by one part."""
    config = None if stage is None else tiny.ds_config(stage, world_size=world().size)
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, storage, double_quant=True, dtype="bfloat16", deepspeed=config)
    plain = [values for m in model.modules() if isinstance(m, FrozenStack) and not m.is_float for values in m.plain]
    with gathered(model.parameters()):
        tensors = {n.removesuffix(".weight"): p.detach().clone() for n, p in model.named_parameters()}
        return tensors, plain, said, bytes_read(model)


@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("case", CONVERTED)
def test_experts_are_put_together_from_each_ranks_part_of_the_file(case: str, storage: str, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, case)
    size = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    expected, plain, _, read = loaded(folder, storage, None)
    assert read == size and (len(plain) == 0) == (storage == "bf16")
    for stage, ranks in ((3, 2), (3, 3), (1, 2)):
        found = run_on_ranks(ranks, loaded, folder, storage, stage)
        for tensors, values, said, _ in found:
            assert tensors.keys() == expected.keys() and values == plain and not any("read whole" in s for s in said)
            for name, own in tensors.items():
                assert torch.equal(own.view(torch.int8), expected[name].view(torch.int8)), name
        assert sum(count for *_, count in found) < 1.25 * size  # of so small tensors, ranks share many blocks


def test_what_transformers_makes_in_another_way_is_read_whole_and_said(tmp_path: Path) -> None:
    """One expert in another type: their joint is of a third."""
    folder = save_experts(tmp_path, "one by one")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "experts.1." in key]:
        tensors[key] = tensors[key].float()
    save_file(tensors, file, metadata={"format": "pt"})
    expected, *_ = loaded(folder, "bf16", None)
    for own, _, said, _ in run_on_ranks(2, loaded, folder, "bf16", 3):
        assert all(torch.equal(own[name], other) for name, other in expected.items())
        if said:  # on rank 0
            sentence = next(line for line in said if "read whole" in line)
            assert re.search(
                r"experts\.\w+ and \d more \(\d\d% of the checkpoint\) were read whole by each of the 2 ranks", sentence
            )
