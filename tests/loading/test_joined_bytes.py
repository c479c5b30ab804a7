"""Experts that a file holds as the storage does: a stack is their bytes one behind the other, or their numbers packed anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb_functional
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_subspace import load_frozen
from dist_subspace.loading.decoded import decoded_index
from dist_subspace.loading.index import CheckpointIndex, open_checkpoint
from dist_subspace.loading.joined_bytes import joined
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.load import bytes_read
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenStack, storage_info
from tests.matrix import tiny
from tests.quantised_folders import FILE, fp8_blocks, load_file, rewritten
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LAYER = "model.layers.0.mlp.experts"


def by_expert(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))


def mixture(
    folder: Path,
    width: int,
    quantise: Callable[[dict[str, Tensor]], None] = by_expert,
    settings: Mapping[str, Any] = FP8,
    hidden: int = 192,
    experts: int = 3,
) -> Path:
    sizes = {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": 2, "hidden_size": hidden}
    config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, head_dim=32)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return rewritten(folder, quantise, quantization_config=settings)


def pieces_of(storage: str, shape: tuple[int, ...]) -> Any:
    in_pieces = storage_info(storage).in_pieces
    assert in_pieces is not None
    return lambda options: in_pieces((shape[0], shape[1]), False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixture"), 256)


def expected(folder: Path, name: str) -> dict[str, Tensor]:
    """The experts' codes and scales of the file, joined as the model joins their matrices."""
    file = load_file(folder / FILE)
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)

    def stacked(ending: str) -> Tensor:
        experts = [torch.cat([file[f"{LAYER}.{e}.{part}.weight{ending}"] for part in parts]) for e in range(3)]
        return torch.stack(experts).view(torch.int8).reshape(-1)

    return {"codes": stacked(""), "scale": stacked("_scale_inv")}


def stacks(folder: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """On a rank of ZeRO-3: the stacks' bytes, and how many bytes were read."""
    model = load_frozen(folder, "fp8", deepspeed=tiny.ds_config(3, world_size=world().size))
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        stack = model.get_submodule(f"{LAYER}.{name}")
        with gathered(list(stack.parameters())):
            found[name] = {own: p.detach().clone().view(-1) for own, p in stack.named_parameters()}
    return found, bytes_read(model)


def test_a_stack_is_its_experts_bytes(folder: Path) -> None:
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, "fp8", dtype="float32")
    for name in ("gate_up_proj", "down_proj"):
        stack = model.get_submodule(f"{LAYER}.{name}")
        assert isinstance(stack, FrozenStack)
        for own, value in expected(folder, name).items():
            assert torch.equal(stack.get_parameter(own).view(-1), value), (name, own)
    assert any("experts.0.down_proj.weight and 17 more in FP8, and so does fp8" in one for one in said), said
    dense = load_frozen(folder, "fp32").get_parameter(f"{LAYER}.gate_up_proj")
    held = model.get_submodule(f"{LAYER}.gate_up_proj")
    assert all(torch.equal(held.expert(e).dense(), dense[e]) for e in range(3))  # type: ignore[operator]


def test_a_rank_reads_its_own_experts(folder: Path) -> None:
    results = run_on_ranks(3, stacks, str(folder))
    for found, _ in results:
        for name, tensors in found.items():
            assert all(torch.equal(tensors[own], value) for own, value in expected(folder, name).items())
    assert sum(read for _, read in results) < 1.1 * (folder / FILE).stat().st_size


def test_experts_that_end_within_a_block_are_packed_anew(tmp_path: Path) -> None:
    """Gate and up are joined, so that the second begins within a block; what is not joined keeps its bytes."""
    folder = mixture(tmp_path, 160)
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, "fp8", dtype="float32")
    down = model.get_submodule(f"{LAYER}.down_proj")
    assert torch.equal(down.get_parameter("codes").view(-1), expected(folder, "down_proj")["codes"])
    dense = load_frozen(folder, "fp32").get_parameter(f"{LAYER}.gate_up_proj")
    held = model.get_submodule(f"{LAYER}.gate_up_proj")
    torch.testing.assert_close(held.expert(2).dense(), dense[2], rtol=0.07, atol=0.01)  # type: ignore[operator]
    assert any(
        "gate_proj.weight and 11 more in FP8, which become float32 numbers and are quantised again" in s for s in said
    )


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    (tmp_path / "config.json").write_text("{}")
    grids = [fp8_blocks(torch.randn(256, 130), (128, 128)) for _ in range(3)]
    codes, scales = (torch.stack([pair[i].view(torch.int8) for pair in grids]) for i in (0, 1))
    tensors = {"w": codes.view(torch.float8_e4m3fn), "w_scale_inv": scales.view(torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    return decoded_index(open_checkpoint(tmp_path), FP8, nn.Linear(1, 1), torch.float32)  # type: ignore[arg-type]


def test_any_run_of_a_stack_that_is_one_tensor(index: CheckpointIndex) -> None:
    whole, cut = Layout.of("w", (3, 256, 130)), Layout.of("w", (3, 256, 130)).narrow(1, 128, 128)
    for layout, first in ((whole, 0), (cut, 1)):
        found = joined(layout, index.held, "fp8", pieces_of("fp8", layout.shape[1:]))
        assert found is not None and found.plain == ({},) * 3
        how = found.as_held
        with RangeReader(index) as reader:
            codes = reader.bytes("w", 0, 3 * 256 * 130).clone().view(3, 256 * 130)[:, first * 128 * 130 :].reshape(-1)
            scale = reader.bytes("w_scale_inv", 0, 4 * 12).clone().view(3, 2, 8)[:, first:].reshape(-1)
            for name, right in (("codes", codes), ("scale", scale)):
                for start, stop in ((0, right.numel()), (5, 11), (right.numel() - 9, right.numel())):
                    read = how.tensors[name](reader.bytes, start, stop)
                    assert torch.equal(read.view(torch.uint8), right[start:stop]), (name, start)


def test_other_layouts_and_storages_are_packed_anew(index: CheckpointIndex) -> None:
    whole = Layout.of("w", (3, 256, 130))
    assert joined(whole, index.held, "fp8", pieces_of("fp8", (256, 130))) is not None
    assert joined(whole, index.held, "int8", pieces_of("int8", (256, 130))) is None
    assert joined(whole.narrow(1, 64, 128), index.held, "fp8", pieces_of("fp8", (128, 130))) is None
    assert joined(whole.narrow(2, 0, 128), index.held, "fp8", pieces_of("fp8", (256, 128))) is None
    assert joined(whole.transpose(1, 2), index.held, "fp8", pieces_of("fp8", (130, 256))) is None
    assert joined(whole, lambda key: None, "fp8", pieces_of("fp8", (256, 130))) is None


def by_bitsandbytes(tensors: dict[str, Tensor], storage: str, double: bool) -> None:
    """Every expert's matrix as bitsandbytes quantises and saves it."""
    for key in [key for key in tensors if ".experts." in key]:
        matrix = tensors.pop(key)
        if storage == "int8":
            codes, scale, _ = bnb_functional.int8_vectorwise_quant(matrix.half())
            tensors |= {key: codes, f"{key.removesuffix('weight')}SCB": scale}
            continue
        codes, state = bnb_functional.quantize_4bit(matrix, quant_type=storage, compress_statistics=double)
        tensors |= {key: codes, **{f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}}


def numbers(file: dict[str, Tensor], key: str, storage: str) -> Tensor:
    """What bitsandbytes reads from the file."""
    if storage == "int8":
        return bnb_functional.int8_vectorwise_dequant(file[key], file[f"{key.removesuffix('weight')}SCB"])
    beside = {name.removeprefix(f"{key}."): value for name, value in file.items() if name.startswith(f"{key}.")}
    state = bnb_functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    shape, state.shape, state.dtype = state.shape, torch.Size((1, state.shape.numel())), torch.float32
    return bnb_functional.dequantize_4bit(file[key].view(-1, 1), state).view(shape)


PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def packed(folder: str, storage: str) -> tuple[dict[str, tuple[dict[str, Tensor], list[Tensor]]], int]:
    """On a rank of ZeRO-3: each stack's tensors and its experts' numbers, and how many bytes were read."""
    model = load_frozen(
        folder, storage, dtype="float32", double_quant=True, deepspeed=tiny.ds_config(3, world_size=world().size)
    )
    found = {}
    for name in PARTS:
        stack: Any = model.get_submodule(f"{LAYER}.{name}")
        with gathered(list(stack.parameters())):
            tensors = {own: p.detach().clone() for own, p in stack.named_parameters()}
            found[name] = tensors, [stack.expert(number).dense() for number in range(stack.experts)]
    return found, bytes_read(model)


@pytest.mark.parametrize(("storage", "double"), [("nf4", True), ("fp4", False), ("int8", False)])
def test_experts_of_bitsandbytes_are_not_rounded_again(tmp_path: Path, storage: str, double: bool) -> None:
    """One by one in the file, as transformers held them before it stacked them; two of them are joined to one matrix, whose
    statistics then have two offsets."""
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": storage != "int8", "load_in_8bit": storage == "int8"}

    def quantise(tensors: dict[str, Tensor]) -> None:
        by_bitsandbytes(tensors, storage, double)

    folder = mixture(tmp_path / "plain", 96, quantise=quantise, settings=settings, experts=4)
    file, results = load_file(folder / FILE), run_on_ranks(3, packed, str(folder), storage)
    for found, _ in results:
        for name, (tensors, dense) in found.items():
            keys = [[f"{LAYER}.{number}.{part}.weight" for part in PARTS[name]] for number in range(4)]
            for own, matrix in zip(keys, dense, strict=True):
                expected = torch.cat([numbers(file, key, storage) for key in own])
                torch.testing.assert_close(matrix, expected, rtol=2e-7 if storage == "int8" else 0, atol=0)
            codes = torch.cat([file[key].view(torch.int8).view(-1) for own in keys for key in own])
            assert torch.equal(tensors["codes"].view(-1), codes), name
            assert ("nested_absmax" in tensors) == (double and name == "down_proj")
    assert sum(read for _, read in results) < 1.25 * (folder / FILE).stat().st_size
    said: list[str] = []
    with heard(said.append):
        load_frozen(folder, storage, double_quant=double)
    assert not any("rounded twice" in one for one in said), said
    kept = f"in bitsandbytes {storage}, and so does {storage}: their"
    if not double:
        assert any(f"and 23 more {kept} bytes are kept as they are" in one for one in said), said
    else:
        assert any(f"and 7 more {kept} bytes are kept as they are" in one for one in said), said
        assert any(f"and 15 more {kept} codes are kept as they are, and their quantised statistics" in s for s in said)


def test_experts_that_end_within_a_block_of_4_bits_are_packed_anew(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = mixture(
        tmp_path, 100, quantise=lambda t: by_bitsandbytes(t, "nf4", double=False), settings=settings, hidden=36
    )
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, "nf4", dtype="float32", double_quant=False)
    file, stack = load_file(folder / FILE), model.get_submodule(f"{LAYER}.gate_up_proj")
    for number in range(3):
        expected = torch.cat(
            [numbers(file, f"{LAYER}.{number}.{part}.weight", "nf4") for part in PARTS["gate_up_proj"]]
        )
        torch.testing.assert_close(stack.expert(number).dense(), expected, rtol=0.3, atol=0.02)  # type: ignore[operator]
    down = model.get_submodule(f"{LAYER}.down_proj")
    codes = torch.cat([file[f"{LAYER}.{number}.down_proj.weight"].view(torch.int8).view(-1) for number in range(3)])
    assert torch.equal(down.get_parameter("codes").view(-1), codes)
    assert any("gate_proj.weight and 11 more" in one and "rounded twice" in one for one in said), said
