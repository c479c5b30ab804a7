"""Folders that transformers and bitsandbytes wrote in 8 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as reference
from torch import Tensor

from dist_subspace import load_frozen
from tests.quantised_folders import (
    FILE,
    by_transformers,
    changed,
    dropped,
    held_part,
    load_file,
    operators,
    refusals,
    rewritten,
    save_bitsandbytes,
    save_plain,
)
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, save_odd

KEY = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    made = {"llama": save_bitsandbytes(top / "int8", save_plain(top / "plain"), load_in_8bit=True)}
    made["gpt2"] = save_bitsandbytes(top / "gpt2-int8", save_odd(top, "gpt2"), load_in_8bit=True)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_byte_is_the_files(folders: dict[str, Path], family: str) -> None:
    file = load_file(folders[family] / FILE)
    held = operators(load_frozen(folders[family], "int8", dtype="float32"), "int8")
    assert held.keys() == {key.removesuffix(".SCB") for key in file if key.endswith(".SCB")} and len(held) >= 7
    for name, operator in held.items():
        assert torch.equal(operator.codes, file[f"{name}.weight"]), name
        assert torch.equal(operator.scale, file[f"{name}.SCB"].view(torch.int8)), name


def test_logits_are_those_of_the_same_numbers_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    """bitsandbytes quantises the activations too; so the numbers are compared in a plain model."""
    file = load_file(folders["llama"] / FILE)
    plain = by_transformers(folders["llama"].parent / "plain")
    for name in (key.removesuffix(".SCB") for key in file if key.endswith(".SCB")):
        dense = reference.int8_vectorwise_dequant(file[f"{name}.weight"], file[f"{name}.SCB"])
        plain.get_submodule(name).weight.data = dense
    expected = logits(plain)
    ours = logits(load_frozen(folders["llama"], "int8", dtype="float32"))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_storage_gets_the_numbers(folders: dict[str, Path], family: str) -> None:
    file = load_file(folders[family] / FILE)
    dense = operators(load_frozen(folders[family], "bf16"), "bf16")
    packed = operators(load_frozen(folders[family], "nf4", double_quant=True), "nf4")
    for name in (key.removesuffix(".SCB") for key in file if key.endswith(".SCB")):
        expected = reference.int8_vectorwise_dequant(file[f"{name}.weight"], file[f"{name}.SCB"]).to(torch.bfloat16)
        assert torch.equal(dense[name].dense(torch.bfloat16), expected), name
        codes, _ = reference.quantize_4bit(expected.contiguous(), quant_type="nf4", compress_statistics=True)
        assert torch.equal(packed[name].codes.view(torch.uint8), codes.view(-1)), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rank_reads_its_own_bytes(folders: dict[str, Path], family: str) -> None:
    results = run_on_ranks(3, held_part, str(folders[family]), "int8", {"codes": ".weight", "scale": ".SCB"})
    assert all(wrong == [] and compared >= 14 for wrong, compared, _ in results)
    assert sum(read for _, _, read in results) < 1.1 * (folders[family] / FILE).stat().st_size


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no scales": (dropped(f"{KEY}.SCB"), r"lack .*up_proj\.SCB, without which .*up_proj\.weight means nothing"),
    "short": (changed(f"{KEY}.SCB", lambda t: t[:-1]), r"SCB as float32 \[319\]; expected float32 with 320 entries"),
    "in 16 bits": (changed(f"{KEY}.SCB", lambda t: t.half()), r"SCB as float16 \[320\]; expected float32"),
    "no codes": (dropped(f"{KEY}.weight"), r"lack .*up_proj\.weight, without which"),
    "floats": (changed(f"{KEY}.weight", lambda t: t.float()), r"up_proj\.weight as float32 .*; expected int8"),
    "layout": (
        changed(f"{KEY}.weight_format", lambda t: t + 1),
        r"in the order of an older GPU kernel .*; save it again",
    ),
}


def test_what_is_missing_or_damaged_is_one_sentence_on_every_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = folders["llama"]
    broken = [str(rewritten(whole, change, tmp_path / name)) for name, (change, _) in BROKEN.items()]
    first, second = run_on_ranks(2, refusals, broken, "int8")
    assert first == second
    for said, (_, pattern) in zip(first, BROKEN.values(), strict=True):
        assert said is not None and re.search(pattern, said), said
