"""Bytes that a storage takes as they are, what it leaves in floats, and what is said of all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.as_held import Place, Quantised
from dist_subspace.loading.decoded import decoded_index
from dist_subspace.loading.index import CheckpointIndex, open_checkpoint
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.storage import storages
from tests.quantised_folders import changed, fp8_blocks, matrices, operators, rewritten, save_plain
from tests.tiny_models import tiny_model

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KEPT = "model.layers.0.self_attn.o_proj.weight"
KEY = "model.layers.0.mlp.up_proj.weight"


def all_but_one(tensors: dict[str, Tensor]) -> None:
    for key in matrices(tensors):
        if key != KEPT:
            tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(save_plain(tmp_path_factory.mktemp("model") / "fp8"), all_but_one, quantization_config=FP8)


@pytest.fixture(scope="module")
def index(folder: Path) -> CheckpointIndex:
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return decoded_index(open_checkpoint(folder), FP8, tiny_model(**sizes), torch.bfloat16)


@pytest.mark.parametrize("storage", list(storages()))
def test_one_storage_takes_the_bytes_and_leaves_the_rest(index: CheckpointIndex, storage: str) -> None:
    quantised = Quantised(index, storage, {}, torch.bfloat16)
    assert len(quantised.weights) == 6
    assert len(quantised.taken) == (6 if storage == "fp8" else 0)
    assert quantised.leaves([KEPT]) == (storage == "fp8") and not quantised.leaves([KEY])


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("fp8", "and 5 more in FP8, and so does fp8: their bytes are kept as they are"),
        ("nf4", "become bfloat16 numbers and are quantised again as nf4: rounded twice; model.storage fp8 keeps them"),
        ("bf16", "become bfloat16 numbers, in 576 KiB instead of 288 KiB; model.storage fp8 keeps them as they are"),
    ],
)
def test_one_sentence_says_what_becomes_of_them(index: CheckpointIndex, storage: str, said: str) -> None:
    quantised = Quantised(index, storage, {}, torch.bfloat16)
    quantised.kept.update(quantised.taken)
    (sentence,) = quantised.notes(set(index))
    assert sentence.startswith(str(index.folder)) and said in sentence, sentence
    (joined,) = Quantised(index, storage, {}, torch.bfloat16).notes(())
    assert "kept as they are" not in joined and "keeps them as they are" not in joined, joined


def test_bytes_are_read_whole_where_nothing_is_read_in_parts(index: CheckpointIndex) -> None:
    """As a placement asks that cuts tensors itself."""
    quantised = Quantised(index, "fp8", {}, torch.bfloat16)
    with RangeReader(index) as reader:
        place = Place(None, reader, torch.device("cpu"))
        operator = quantised.operator(KEY, (320, 192), place, lambda v: v, lambda: None, bias=None, origin=None)
        codes = reader.bytes(KEY, 0, 320 * 192).view(torch.int8).view(320, 192)
        assert torch.equal(operator.get_parameter("codes"), codes)
        assert torch.equal(operator.get_parameter("scale"), reader.bytes(f"{KEY}_scale_inv", 0, 24).view(torch.int8))
    assert torch.equal(operator.dense(torch.bfloat16), index.read(KEY))


def test_what_the_maker_left_in_floats_stays_so_in_the_same_storage_alone(folder: Path) -> None:
    name = KEPT.removesuffix(".weight")
    assert name not in operators(load_frozen(folder, "fp8"), "fp8")
    assert name in operators(load_frozen(folder, "nf4"), "nf4")


@pytest.mark.parametrize("storage", ["fp8", "nf4", "fp16"])
def test_numbers_that_float16_cannot_hold_are_refused(folder: Path, tmp_path: Path, storage: str) -> None:
    large = rewritten(folder, changed(f"{KEY}_scale_inv", lambda t: t * 1e6), tmp_path / "large")
    with pytest.raises(UsageError, match=r"up_proj\.weight has values up to .*, which float16 cannot hold"):
        load_frozen(large, storage, dtype="float16")
