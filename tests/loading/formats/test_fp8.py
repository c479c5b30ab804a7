"""Folders in FP8, with scales of every shape: the numbers of transformers, the file's bytes where the storage holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as reference
from torch import Tensor
from transformers.integrations.finegrained_fp8 import FP8Linear, Fp8Quantize

from dist_subspace import load_frozen
from dist_subspace.loading.load import bytes_read
from dist_subspace.notices import heard
from dist_subspace.placement.collectives import world
from dist_subspace.placement.tensors import gathered
from tests.matrix import tiny
from tests.quantised_folders import (
    FILE,
    by_transformers,
    changed,
    dropped,
    factors,
    fp8_blocks,
    held_part,
    load_file,
    matrices,
    operators,
    refusals,
    rewritten,
    save_plain,
)
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, tiny_config

EVEN = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_key_value_heads": 4,
}  # whole blocks, as the released models have
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KEY = "model.layers.0.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    return {"even": save_plain(top / "even", **EVEN), "odd": save_plain(top / "odd")}


def in_blocks(block: tuple[int, int], scale_type: torch.dtype = torch.float32, ending: str = "_scale_inv") -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in matrices(tensors):
            tensors[key], grid = fp8_blocks(tensors[key], block)
            tensors[f"{key}{ending}"] = grid.to(scale_type)

    return change


def by_the_quantiser(tensors: dict[str, Tensor]) -> None:
    """As transformers itself quantises."""
    settings = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    for key in matrices(tensors):
        tensors |= Fp8Quantize(settings).convert({key: tensors[key]})


def in_one(ending: str, shape: tuple[int, ...], extra: dict[str, Tensor] | None = None) -> Change:
    """One scale a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in matrices(tensors):
            tensors[key], grid = fp8_blocks(tensors[key], tuple(tensors[key].shape))  # type: ignore[arg-type]
            tensors[f"{key}{ending}"] = grid.view(shape)
            for name, value in (extra or {}).items():
                tensors[f"{key.removesuffix('weight')}{name}"] = value.clone()

    return change


def rows(tensors: dict[str, Tensor]) -> None:
    """One scale a row, in 16 bits."""
    for key in matrices(tensors):
        tensors[key], grid = fp8_blocks(tensors[key], (1, tensors[key].shape[1]))
        tensors[f"{key}_scale"] = grid.to(torch.bfloat16)


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


ONE = torch.tensor(0.5)
# name -> folder, tensors, quantization_config, block (None: of the whole, 0: a row), whether the storage fp8 holds the bytes
KINDS: dict[str, tuple[str, Change, dict[str, Any], tuple[int, int] | int | None, bool]] = {
    "blocks": ("even", by_the_quantiser, FP8, (128, 128), True),
    "scales in 16 bits": ("even", in_blocks((128, 128), torch.bfloat16), FP8, (128, 128), True),
    "powers of two": (
        "even",
        in_blocks((128, 128), torch.float8_e8m0fnu),
        {**FP8, "scale_fmt": "ue8m0"},
        (128, 128),
        True,
    ),
    "odd sides": ("odd", in_blocks((128, 128)), FP8, (128, 128), True),
    "small blocks": ("odd", in_blocks((64, 32)), {**FP8, "weight_block_size": [64, 32]}, (64, 32), False),
    "a tensor": ("odd", in_one("_scale_inv", ()), {**FP8, "weight_block_size": None}, None, True),
    "static": (
        "odd",
        in_one("_scale_inv", (), {"activation_scale": ONE}),
        {**FP8, "weight_block_size": None, "activation_scheme": "static"},
        None,
        True,
    ),
    "fbgemm": ("odd", rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 0, False),
    "compressed rows": ("odd", rows, compressed(strategy="channel"), 0, False),
    "compressed tensors": (
        "odd",
        in_one("_scale", (1,), {"input_scale": ONE}),
        compressed(strategy="tensor"),
        None,
        True,
    ),
    "compressed blocks": (
        "odd",
        in_blocks((128, 128), torch.bfloat16, "_scale"),
        compressed(strategy="block", block_structure=[128, 128]),
        (128, 128),
        True,
    ),
}
# What transformers loads on a CPU, without another package and with the blocks that were meant.
COMPARABLE = ("blocks", "scales in 16 bits", "powers of two", "a tensor", "static")


def written(plain: dict[str, Path], kind: str, out: Path) -> Path:
    sizes, change, settings, _, _ = KINDS[kind]
    return rewritten(plain[sizes], change, out / kind, quantization_config=settings)


def numbers(folder: Path, kind: str) -> dict[str, Tensor]:
    """The definition: each code times its scale, in float32."""
    block, file = KINDS[kind][3], load_file(folder / FILE)
    found = {}
    for key in matrices(file):
        codes = file[key].float()
        scale = next(file[key + ending] for ending in ("_scale_inv", "_scale") if key + ending in file)
        size = tuple(codes.shape) if block is None else (1, codes.shape[1]) if block == 0 else block
        grid = scale.float().reshape(math.ceil(codes.shape[0] / size[0]), -1)  # type: ignore[index]
        found[key.removesuffix(".weight")] = codes * factors(grid, size, tuple(codes.shape))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_codes_times_scales_in_every_type(plain: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = written(plain, kind, tmp_path)
    wide, narrow = load_frozen(folder, "fp32"), load_frozen(folder, "bf16")
    expected = numbers(folder, kind)
    assert len(expected) == 7
    for name, matrix in expected.items():
        assert torch.equal(wide.get_submodule(name).dense(torch.float32), matrix), name  # type: ignore[operator]
        held = narrow.get_submodule(name).dense(torch.bfloat16)  # type: ignore[operator]
        assert torch.equal(held, matrix.to(torch.bfloat16)), name
    if kind in COMPARABLE:
        for model, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
            theirs = by_transformers(folder, dtype=dtype)
            for name in expected:
                assert torch.equal(theirs.get_submodule(name).weight, model.get_submodule(name).dense(dtype)), name  # type: ignore[operator]
        expected_logits = logits(by_transformers(folder).float())  # what is not quantised, it leaves in bfloat16
        torch.testing.assert_close(
            logits(wide), expected_logits, rtol=1e-4, atol=1e-4 * float(expected_logits.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_storage_fp8_keeps_codes_where_it_has_such_scales(
    plain: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    folder, said = written(plain, kind, tmp_path), []
    with heard(said.append):
        held = operators(load_frozen(folder, "fp8", dtype="float32"), "fp8")
    file, expected = load_file(folder / FILE), numbers(folder, kind)
    assert held.keys() == expected.keys()
    for name, operator in held.items():
        kept = torch.equal(operator.codes, file[f"{name}.weight"].view(torch.int8))
        exact = torch.equal(operator.dense(torch.float32), expected[name])
        if KINDS[kind][4]:
            assert kept and exact, name
        else:
            assert not exact
            torch.testing.assert_close(operator.dense(torch.float32), expected[name], rtol=0.07, atol=0.01)
    told = [one for one in said if " in FP8" in one]
    assert (
        len(told) == 1
        and ("kept as they are" in told[0]) == KINDS[kind][4]
        and ("rounded twice" in told[0]) != KINDS[kind][4]
    )


def test_a_last_block_is_the_shorter_one_as_in_transformers_layer(plain: dict[str, Path], tmp_path: Path) -> None:
    """Its dequantising load does not: it refuses a side of 320, and takes blocks of 96 for 192 = 128 + 64."""
    folder = written(plain, "odd sides", tmp_path)
    file = load_file(folder / FILE)
    layer = FP8Linear(192, 320, block_size=(128, 128))
    assert tuple(layer.weight_scale_inv.shape) == tuple(file[f"{KEY}_scale_inv"].shape) == (3, 2)
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    theirs = _dequantize_fp8_weight(file[KEY], file[f"{KEY}_scale_inv"], [128, 128], torch.float32)
    ours = load_frozen(folder, "fp32").get_submodule(KEY.removesuffix(".weight"))
    assert torch.equal(ours.dense(torch.float32), theirs)  # type: ignore[operator]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_reads_its_own_bytes(plain: dict[str, Path], ranks: int, tmp_path: Path) -> None:
    folder = written(plain, "odd sides", tmp_path)
    names = {"codes": ".weight", "scale": ".weight_scale_inv"}
    results = run_on_ranks(ranks, held_part, str(folder), "fp8", names)
    assert all(wrong == [] and compared == 14 for wrong, compared, _ in results)
    assert sum(read for _, _, read in results) < 1.1 * (folder / FILE).stat().st_size


def packed_whole(folder: str, storage: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """On a rank of ZeRO-3: every operator's tensors, gathered, and the bytes that the rank read."""
    model = load_frozen(folder, storage, double_quant=False, deepspeed=tiny.ds_config(3, world_size=world().size))
    held = operators(model, storage)
    found = {}
    for name, operator in held.items():
        with gathered(list(operator.parameters())):
            found[name] = {key: value.detach().clone() for key, value in operator.named_parameters()}
    return found, bytes_read(model)


@pytest.mark.parametrize("kind", ["odd sides", "compressed rows"])
def test_a_rank_quantises_its_own_part_again(plain: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = written(plain, kind, tmp_path)
    (found, first), (_, second), (_, third) = run_on_ranks(3, packed_whole, str(folder), "nf4")
    for name, matrix in numbers(folder, kind).items():
        codes, state = reference.quantize_4bit(matrix.to(torch.bfloat16), blocksize=64, quant_type="nf4")
        assert torch.equal(found[name]["codes"].view(torch.uint8), codes.view(-1)), name
        assert torch.equal(found[name]["absmax"].view(torch.float32), state.absmax), name
    assert first + second + third < 1.2 * (folder / FILE).stat().st_size


def experts_by_one(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))


def test_experts_are_joined_as_transformers_joins_them(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 128, "num_experts": 3, "num_experts_per_tok": 2, "hidden_size": 128}
    config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, head_dim=32)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    folder = rewritten(tmp_path, experts_by_one, quantization_config=FP8)
    expected = by_transformers(folder).float()
    ours = load_frozen(folder, "fp32")
    theirs = {name: value for name, value in expected.named_parameters() if "experts" in name}
    assert len(theirs) == 4
    for name, value in theirs.items():
        assert torch.equal(ours.get_parameter(name), value), name
    torch.testing.assert_close(logits(ours), logits(expected), rtol=1e-4, atol=1e-4)


def in_fp4(tensors: dict[str, Tensor]) -> None:
    """The experts in 4 bits, every code among them, with a power of 2 for each 32 of a row; the other matrices in FP8."""
    generator = torch.Generator().manual_seed(5)
    for key in matrices(tensors):
        if ".experts." not in key:
            tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))
            continue
        rows, columns = tensors[key].shape
        tensors[key] = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
        exponents = torch.randint(118, 126, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scale_inv"] = exponents.view(torch.float8_e8m0fnu)


def expert_stacks(folder: str, storage: str) -> dict[str, Tensor]:
    """On a rank of ZeRO-3: the stacks, gathered."""
    model = load_frozen(folder, storage, deepspeed=tiny.ds_config(3, world_size=world().size))
    stacks = {name: module for name, module in model.named_modules() if name.endswith(("gate_up_proj", "down_proj"))}
    found = {}
    for name, stack in stacks.items():
        with gathered(list(stack.parameters())):
            found[name] = next(stack.parameters()).detach().clone()
    return found


def test_experts_in_4_bits_beside_fp8_are_the_numbers_of_transformers(tmp_path: Path) -> None:
    """As DeepSeek-V4 is released: two numbers a byte."""
    sizes = {"moe_intermediate_size": 96, "num_experts": 3, "num_experts_per_tok": 2, "hidden_size": 128}
    config = tiny_config("Qwen3MoeConfig", **sizes, num_key_value_heads=2, head_dim=32)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    folder = rewritten(tmp_path, in_fp4, quantization_config=FP8)
    theirs = by_transformers(folder).named_parameters()
    expected = {name: value.detach() for name, value in theirs if name.endswith(("gate_up_proj", "down_proj"))}
    assert len(expected) == 4 and all(value.abs().max() > 0.01 for value in expected.values())
    said: list[str] = []
    with heard(said.append):
        ours = load_frozen(folder, "fp32")
    for name, value in expected.items():
        assert torch.equal(ours.get_parameter(name), value.float()), name
    assert any("and 17 more in FP4, which become float32 numbers" in one for one in said), said
    for found in run_on_ranks(2, expert_stacks, str(folder), "bf16"):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.items())


FOUR_BITS = compressed() | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}
SCALE = f"{KEY}_scale_inv"
BROKEN: dict[str, tuple[Change, dict[str, Any], str]] = {
    "no scale": (dropped(SCALE), FP8, r"lack .*up_proj\.weight_scale_inv, without which"),
    "no codes": (dropped(KEY), FP8, r"hold .*up_proj\.weight_scale_inv, but no float8 weight that it belongs to"),
    "floats": (changed(KEY, lambda t: t.float()), FP8, r"hold .*up_proj\.weight_scale_inv, but no float8 weight"),
    "short": (changed(SCALE, lambda t: t[:1]), FP8, r"\[1, 2\], which does not fit .*\[320, 192\]; expected \[3, 2\]"),
    "codes": (changed(SCALE, lambda t: t.to(torch.float8_e4m3fn)), FP8, r"expected a matrix and floats"),
    "other blocks": (lambda t: None, {**FP8, "weight_block_size": [64, 64]}, r"does not fit .*; expected \[\d, \d\]"),
    "4 bits": (lambda t: None, FOUR_BITS, r"are compressed-tensors of 4 bits .*which are not read; accepted"),
}


def test_what_is_missing_or_damaged_is_one_sentence_on_every_rank(plain: dict[str, Path], tmp_path: Path) -> None:
    whole = written(plain, "odd sides", tmp_path)
    broken = [
        str(rewritten(whole, change, tmp_path / name, quantization_config=settings))
        for name, (change, settings, _) in BROKEN.items()
    ]
    first, second = run_on_ranks(2, refusals, broken, "fp8")
    assert first == second
    for said, (_, _, pattern) in zip(first, BROKEN.values(), strict=True):
        assert said is not None and re.search(pattern, said), said


def test_float16_refuses_what_it_cannot_hold(plain: dict[str, Path], tmp_path: Path) -> None:
    whole = written(plain, "odd sides", tmp_path)
    folder = rewritten(whole, changed(f"{KEY}_scale_inv", lambda t: t * 1e6), tmp_path / "large")
    said = run_on_ranks(2, large, str(folder))
    assert said[0] == said[1] and all(
        re.search(r"up_proj\.weight has values up to .*, which float16 cannot hold", one) for one in said
    )


def large(folder: str) -> str:
    from dist_subspace.errors import UsageError

    for storage in ("fp8", "nf4"):
        try:
            load_frozen(folder, storage, dtype="float16", deepspeed=tiny.ds_config(3, world_size=world().size))
        except UsageError as error:
            continue_with = str(error)
        else:
            return f"{storage} was loaded"
    return continue_with
