"""Folders that transformers and bitsandbytes wrote in 4 bits: the same bytes in the same storage, the same numbers elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as reference
from bitsandbytes import nn as reference_layers
from torch import Tensor

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.notices import heard
from tests.quantised_folders import (
    FILE,
    by_transformers,
    changed,
    dropped,
    held_part,
    matrices,
    operators,
    refusals,
    rewritten,
    save_bitsandbytes,
    save_plain,
)
from tests.ranks import run_on_ranks
from tests.tiny_models import logits, save_odd

KINDS: dict[str, dict[str, Any]] = {
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
BYTES = {"codes": ".weight", "absmax": ".weight.absmax", "nested_absmax": ".weight.nested_absmax"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    plain = save_plain(top / "plain")
    made = {kind: save_bitsandbytes(top / kind, plain, load_in_4bit=True, **own) for kind, own in KINDS.items()}
    double = KINDS["nf4-double"]
    made["gpt2"] = save_bitsandbytes(top / "gpt2-nf4", save_odd(top, "gpt2"), load_in_4bit=True, **double)
    return made | {"plain": plain}


def theirs(folder: Path) -> dict[str, Any]:
    modules = by_transformers(folder).named_modules()
    return {name: module for name, module in modules if isinstance(module, reference_layers.Linear4bit)}


def matrix_of(layer: Any) -> Tensor:
    """Decoded as one run of blocks, which is what they are."""
    state, shape = layer.weight.quant_state, layer.weight.quant_state.shape
    state.dtype, state.shape = torch.float32, torch.Size((1, shape.numel() + shape.numel() % 2))
    return reference.dequantize_4bit(layer.weight.data, state).view(-1)[: shape.numel()].view(shape)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_every_byte_is_the_files(folders: dict[str, Path], kind: str) -> None:
    storage = "fp4" if kind.startswith("fp4") else "nf4"
    held = operators(load_frozen(folders[kind], storage, double_quant=True, dtype="float32"), storage)
    layers = theirs(folders[kind])
    assert held.keys() == layers.keys() and len(held) >= 7
    for name, layer in layers.items():
        state, operator = layer.weight.quant_state, held[name]
        assert torch.equal(operator.codes.view(torch.uint8), layer.weight.data.view(torch.uint8).view(-1)), name
        assert torch.equal(operator.absmax, state.absmax.view(torch.int8)), name
        assert operator.shape == tuple(state.shape)
        if state.nested:
            assert torch.equal(operator.nested_absmax, state.state2.absmax.view(torch.int8)), name
            assert operator.offset == state.offset.item()
        assert operator.double_quant == state.nested


def test_logits_are_transformers(folders: dict[str, Path]) -> None:
    ours = load_frozen(folders["nf4-double"], "nf4", double_quant=True, dtype="float32")
    # In evaluation bitsandbytes repacks the bytes on some CPUs, and rounds their statistics.
    expected = logits(by_transformers(folders["nf4-double"]).train())
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert getattr(ours.config, "quantization_config", None) is None


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["nf4-double", "nf4"])
def test_a_rank_reads_its_own_bytes(folders: dict[str, Path], kind: str, ranks: int) -> None:
    names = BYTES if kind.endswith("double") else {name: BYTES[name] for name in ("codes", "absmax")}
    results = run_on_ranks(ranks, held_part, str(folders[kind]), "nf4", names)
    assert all(wrong == [] and compared == 7 * len(names) for wrong, compared, _ in results)
    size = (folders[kind] / FILE).stat().st_size
    assert sum(read for _, _, read in results) < 1.25 * size  # each rank reads the values' tables


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["nf4-double", "fp4-double", "gpt2"])
def test_another_storage_gets_the_numbers(folders: dict[str, Path], kind: str, storage: str) -> None:
    said: list[str] = []
    with heard(said.append):
        held = operators(load_frozen(folders[kind], storage), storage)
    layers = theirs(folders[kind])
    for name, layer in layers.items():
        if kind == "gpt2" and storage == "int8":
            continue  # odd sizes are covered by the other storage
        matrix = matrix_of(layer).to(torch.bfloat16)
        if storage == "bf16":
            assert torch.equal(held[name].dense(torch.bfloat16), matrix), name
        else:
            codes, scale, _ = reference.int8_vectorwise_quant(matrix.half())
            assert torch.equal(held[name].codes, codes) and torch.equal(held[name].scale, scale.view(torch.int8)), name
    quantised_again = "quantised again as int8: rounded twice" if storage == "int8" else r"KiB instead of"
    own = "fp4" if kind.startswith("fp4") else "nf4"
    told = next(sentence for sentence in said if f"in bitsandbytes {own}" in sentence)
    assert quantised_again in told and f"model.storage {own} keeps them as they are" in told


def requantised(tensors: dict[str, Tensor], blocksize: int) -> None:
    """Every matrix in blocks of another size."""
    weights = {key for key in tensors if f"{key}.absmax" in tensors}
    for key in weights:
        for beside in [name for name in tensors if name.startswith(f"{key}.")]:
            del tensors[beside]
        shape = (192, 192) if "self_attn" in key else (192, 320) if "down" in key else (320, 192)
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        codes, state = reference.quantize_4bit(matrix, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
        tensors[key] = codes
        tensors |= {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}


def test_other_blocks_are_kept_too(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = rewritten(folders["nf4-double"], lambda tensors: requantised(tensors, 128), tmp_path / "128")
    ours = load_frozen(folder, "nf4", dtype="float32")
    expected = theirs(folder)
    for name, operator in operators(ours, "nf4").items():
        assert operator.blocksize == 128
        assert torch.equal(operator.dense(torch.float32), matrix_of(expected[name])), name
    assert operators(load_frozen(folder, "bf16"), "bf16").keys() >= expected.keys()


def test_statistics_stay_as_the_file_has_them_and_it_is_said(folders: dict[str, Path]) -> None:
    said: list[str] = []
    with heard(said.append):
        load_frozen(folders["nf4-double"], "nf4", double_quant=False)
        load_frozen(folders["nf4"], "nf4", double_quant=True)
    assert any("their statistics are quantised too, although model.double_quant is false" in one for one in said)
    assert any("their statistics are not quantised too, although model.double_quant is true" in one for one in said)


def test_layers_that_the_maker_left_in_floats_stay_so(folders: dict[str, Path], tmp_path: Path) -> None:
    kept = ["lm_head", "model.layers.0.self_attn.o_proj"]
    folder = save_bitsandbytes(
        tmp_path, folders["plain"], load_in_4bit=True, llm_int8_skip_modules=kept, **KINDS["nf4-double"]
    )
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, "nf4", double_quant=True)
    assert operators(model, "nf4").keys() == theirs(folder).keys()
    assert model.get_submodule(kept[1]).storage == "bf16"  # type: ignore[union-attr]
    assert any("held in bfloat16 and not in nf4: model.layers.0.self_attn.o_proj" in one for one in said), said
    # What is quantised anew is quantised wherever the storage holds it.
    assert kept[1] in operators(load_frozen(folder, "int8"), "int8")


KEY = "model.layers.0.mlp.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


def state_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no absmax": (dropped(f"{KEY}.absmax"), r"lack .*up_proj\.weight\.absmax, without which"),
    "no state": (dropped(STATE), r"lack .*up_proj\.weight\.quant_state.*, without which .*means nothing"),
    "no codes": (dropped(KEY), r"lack .*up_proj\.weight, without which"),
    "no nested": (dropped(f"{KEY}.nested_absmax"), r"lack .*nested_absmax"),
    "short": (changed(f"{KEY}.absmax", lambda t: t[:-1]), r"absmax as uint8 \[959\]; expected uint8 with 960 entries"),
    "floats": (changed(f"{KEY}.absmax", lambda t: t.float()), r"absmax as float32 \[960\]; expected uint8"),
    "short codes": (
        changed(KEY, lambda t: t[:-3]),
        r"weight as uint8 \[30717, 1\]; expected uint8 with 30,720 entries",
    ),
    "map": (changed(f"{KEY}.quant_map", lambda t: t * 2), r"quant_map with other values than bitsandbytes' own"),
    "nested map": (changed(f"{KEY}.nested_quant_map", lambda t: t * 2), r"nested_quant_map with other values"),
    "no json": (changed(STATE, lambda t: state_of("{")), r"which does not say how they are quantised"),
    "no shape": (changed(STATE, lambda t: state_of('{"blocksize": 64}')), r"not say how they are quantised \(KeyError"),
}


def test_what_is_missing_or_damaged_is_one_sentence_on_every_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = folders["nf4-double"]
    broken = [str(rewritten(whole, change, tmp_path / name)) for name, (change, _) in BROKEN.items()]
    first, second = run_on_ranks(2, refusals, broken, "nf4")
    assert first == second
    for folder, said, (_, pattern) in zip(broken, first, BROKEN.values(), strict=True):
        assert said is not None and folder in said and re.search(pattern, said), said


def test_other_nested_blocks_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | {"nested_blocksize": 128}
        tensors[STATE] = state_of(json.dumps(state))

    with pytest.raises(UsageError, match="in blocks of 128; accepted: 256"):
        load_frozen(rewritten(folders["nf4-double"], change, tmp_path / "other"), "nf4")


def test_a_configuration_of_what_is_not_quantised_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = rewritten(folders["plain"], lambda t: None, tmp_path / "plain", quantization_config=settings)
    said: list[str] = []
    with heard(said.append):
        model = load_frozen(folder, "bf16")
    assert any("none of the weights is quantised: they are read as the numbers that they are" in one for one in said)
    assert len(operators(model, "bf16")) >= len(matrices(dict(model.state_dict())))
