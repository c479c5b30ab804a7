"""Experts that a file holds as the storage does: a stack is their bytes one behind the other, or their numbers packed anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
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


def mixture(folder: Path, width: int) -> Path:
    sizes = {"moe_intermediate_size": width, "num_experts": 3, "num_experts_per_tok": 2, "hidden_size": 192}
    config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, head_dim=32)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return rewritten(folder, by_expert, quantization_config=FP8)


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
    in_pieces = storage_info("fp8").in_pieces
    assert in_pieces is not None
    whole, cut = Layout.of("w", (3, 256, 130)), Layout.of("w", (3, 256, 130)).narrow(1, 128, 128)
    for layout, first in ((whole, 0), (cut, 1)):
        how = joined(layout, index.held, "fp8", in_pieces(layout.shape[1:], False))
        assert how is not None
        with RangeReader(index) as reader:
            codes = reader.bytes("w", 0, 3 * 256 * 130).clone().view(3, 256 * 130)[:, first * 128 * 130 :].reshape(-1)
            scale = reader.bytes("w_scale_inv", 0, 4 * 12).clone().view(3, 2, 8)[:, first:].reshape(-1)
            for name, right in (("codes", codes), ("scale", scale)):
                for start, stop in ((0, right.numel()), (5, 11), (right.numel() - 9, right.numel())):
                    read = how.tensors[name](reader.bytes, start, stop)
                    assert torch.equal(read.view(torch.uint8), right[start:stop]), (name, start)


def test_other_layouts_and_storages_are_packed_anew(index: CheckpointIndex) -> None:
    in_pieces = storage_info("fp8").in_pieces
    assert in_pieces is not None
    whole = Layout.of("w", (3, 256, 130))
    assert joined(whole, index.held, "fp8", in_pieces((256, 130), False)) is not None
    assert joined(whole, index.held, "int8", in_pieces((256, 130), False)) is None
    assert joined(whole.narrow(1, 64, 128), index.held, "fp8", in_pieces((128, 130), False)) is None
    assert joined(whole.narrow(2, 0, 128), index.held, "fp8", in_pieces((256, 128), False)) is None
    assert joined(whole.transpose(1, 2), index.held, "fp8", in_pieces((130, 256), False)) is None
    assert joined(whole, lambda key: None, "fp8", in_pieces((256, 130), False)) is None
