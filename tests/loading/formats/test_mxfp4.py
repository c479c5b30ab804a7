"""Folders in MXFP4, as gpt-oss is released: the numbers of transformers, in stacks of experts of every storage."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from dist_subspace import load_frozen
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenStack, pack_stack, storages
from tests.matrix import tiny
from tests.quantised_folders import by_transformers, changed, dropped, refusals, rewritten
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, tiny_config

SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
NAMES = ("gate_up_proj", "down_proj")
LAYER = "model.layers.0.mlp.experts"


def in_mxfp4(tensors: dict[str, Tensor]) -> None:
    """Random codes and exponents, every code and the smallest and largest exponents of a model among them."""
    generator = torch.Generator().manual_seed(3)
    for key in [key for key in tensors if key.endswith(NAMES)]:
        experts, d_in, d_out = tensors.pop(key).shape
        blocks = (experts, d_out, d_in // 32, 16)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 126, blocks[:3], generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"][0, 0, 0], tensors[f"{key}_scales"][0, 1, 0] = 0, 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2}
    heads = {"head_dim": 16, "num_key_value_heads": 2}
    transformers.GptOssForCausalLM(tiny_config("GptOssConfig", **sizes, **heads)).to(torch.bfloat16).save_pretrained(
        folder
    )
    return rewritten(folder, in_mxfp4, quantization_config=SETTINGS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    """Of transformers, which dequantises on a CPU."""
    model = by_transformers(folder, dtype=torch.bfloat16)
    return {name: value.detach() for name, value in model.named_parameters() if name.endswith(NAMES)}


@pytest.mark.parametrize("storage", ["bf16", "fp32"])
def test_numbers_are_transformers(folder: Path, expected: dict[str, Tensor], storage: str) -> None:
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, storage)
    assert len(expected) == 4
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(name).to(torch.bfloat16), value), name
    if storage == "fp32":
        theirs = logits(by_transformers(folder))
        torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert any("in MXFP4, which become" in one for one in said)


@pytest.mark.parametrize("storage", [name for name, info in storages().items() if info.dtype is None])
def test_stacks_are_what_the_storage_makes_of_the_numbers(
    folder: Path, expected: dict[str, Tensor], storage: str
) -> None:
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, storage)
    for name, value in expected.items():
        stack = model.get_submodule(name)
        assert isinstance(stack, FrozenStack) and stack.transposed
        wanted = pack_stack(value, storage, transposed=True)
        for own, parameter in stack.named_parameters():
            assert torch.equal(parameter, wanted.get_parameter(own)), name
        assert torch.isfinite(stack.expert(1).dense()).all()
    assert any(
        f"quantised again as {storage}: rounded twice; of the 16-bit model they would be rounded once" in s
        for s in said
    )


def stacks(folder: str, storage: str) -> dict[str, Tensor]:
    """On a rank of ZeRO-3: the experts, gathered."""
    model = load_frozen(folder, storage, deepspeed=tiny.ds_config(3, world_size=world().size))
    found = {}
    for name in (f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in NAMES):
        stack = model.get_submodule(name)
        with gathered(list(stack.parameters())):
            found[name] = next(stack.parameters()).detach().clone()
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_hold_parts_of_the_same(folder: Path, expected: dict[str, Tensor], ranks: int) -> None:
    for found in run_on_ranks(ranks, stacks, str(folder), "bf16"):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


SCALES, BLOCKS = f"{LAYER}.down_proj_scales", f"{LAYER}.down_proj_blocks"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no scales": (dropped(SCALES), r"lack .*down_proj_scales, without which"),
    "no blocks": (dropped(BLOCKS), r"lack .*down_proj_blocks, without which .*down_proj_scales means nothing"),
    "short scales": (
        changed(SCALES, lambda t: t[..., :-1]),
        r"down_proj_scales as uint8 .*; expected uint8 with 576 entries",
    ),
    "turned scales": (changed(SCALES, lambda t: t.mT), r"down_proj_scales with shape .*; expected \[3, 64, 3\]"),
    "float scales": (changed(SCALES, lambda t: t.float()), r"down_proj_scales as float32 .*; expected uint8"),
    "short blocks": (
        changed(BLOCKS, lambda t: t[..., :8]),
        r"down_proj_blocks with shape .*; expected \(\.\.\., groups, 16\)",
    ),
    "fewer experts": (
        lambda t: t.update({key: t[key][:2].contiguous() for key in (SCALES, BLOCKS)}),
        r"down_proj as \[2, 96, 64\], but config\.json asks for \[3, 96, 64\]",
    ),
}


def test_what_is_missing_or_damaged_is_one_sentence_on_every_rank(folder: Path, tmp_path: Path) -> None:
    broken = [str(rewritten(folder, change, tmp_path / name)) for name, (change, _) in BROKEN.items()]
    first, second = run_on_ranks(2, refusals, broken, "nf4")
    assert first == second
    for said, (_, pattern) in zip(first, BROKEN.values(), strict=True):
        assert said is not None and re.search(pattern, said), said
