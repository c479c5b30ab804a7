"""A folder of quantised weights is a plain model to whoever plans and reads: in several files, tied, merged, by identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import dist_subspace as dsub
from dist_subspace.api import load_adapted
from dist_subspace.checkpoint.fingerprint import base_fingerprint
from dist_subspace.errors import UsageError
from dist_subspace.loading.decoded import decoded_index
from dist_subspace.loading.index import open_checkpoint
from tests.quantised_folders import (
    FILE,
    changed,
    fp8_blocks,
    matrices,
    operators,
    rewritten,
    save_plain,
)
from tests.tiny_models import logits

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KEY = "model.layers.0.mlp.up_proj.weight"


def quantised(tensors: dict[str, Tensor]) -> None:
    for key in matrices(tensors):
        tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(save_plain(tmp_path_factory.mktemp("model") / "fp8"), quantised, quantization_config=FP8)


def dequantised(folder: Path) -> dict[str, Tensor]:
    """By the definition."""
    file = load_file(folder / FILE)
    for key in matrices(file):
        scale = file.pop(f"{key}_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
        file[key] = file[key].float() * scale[: file[key].shape[0], : file[key].shape[1]]
    return file


def in_two_files(folder: Path, out: Path) -> Path:
    """Codes in one file, scales in the other."""
    shutil.copytree(folder, out)
    tensors = load_file(out / FILE)
    (out / FILE).unlink()
    names = {key: f"model-{1 + key.endswith('_inv')}.safetensors" for key in tensors}
    for name in set(names.values()):
        own = {key: value for key, value in tensors.items() if names[key] == name}
        save_file(own, out / name, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return out


@pytest.mark.parametrize("storage", ["fp32", "fp8", "nf4"])
def test_codes_and_scales_may_lie_in_two_files(folder: Path, tmp_path: Path, storage: str) -> None:
    one, two = dsub.load_frozen(folder, storage), dsub.load_frozen(in_two_files(folder, tmp_path / "two"), storage)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    (tmp_path / "two" / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"names model-2\.safetensors, which is not in the folder"):
        dsub.load_frozen(tmp_path / "two", storage)


def test_a_quantised_head_and_embedding_become_numbers_and_stay_tied(folder: Path, tmp_path: Path) -> None:
    """Tied ones that the file holds twice are one parameter where the numbers are the same."""

    def change(tensors: dict[str, Tensor]) -> None:
        codes, scale = fp8_blocks(tensors.pop("model.embed_tokens.weight"), (128, 128))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = codes.clone(), scale.clone()

    tied = rewritten(folder, change, tmp_path / "tied", tie_word_embeddings=True)
    model: Any = dsub.load_frozen(tied, "fp8", dtype="float32")
    file = load_file(tied / FILE)
    expected = file["lm_head.weight"].float() * file["lm_head.weight_scale_inv"].repeat_interleave(128, 1)[:, :192]
    assert torch.equal(model.lm_head.weight, expected) and model.lm_head.weight is model.model.embed_tokens.weight
    apart = rewritten(tied, changed("lm_head.weight_scale_inv", lambda t: t * 2), tmp_path / "apart")
    other: Any = dsub.load_frozen(apart, "fp8", dtype="float32")
    assert torch.equal(other.lm_head.weight, 2 * expected) and torch.equal(other.model.embed_tokens.weight, expected)


@pytest.mark.parametrize("storage", ["fp8", "nf4", "bf16"])
def test_a_merged_model_is_plain(folder: Path, tmp_path: Path, storage: str) -> None:
    model = dsub.attach(dsub.load_frozen(folder, storage, dtype="bfloat16"), dsub.SubspaceConfig(method="lora", rank=4))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.normal_(std=0.05)
    dsub.merge(model, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [key for key in load_file(tmp_path / "merged" / FILE) if "scale" in key]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(model).float()
    torch.testing.assert_close(logits(merged), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_an_adapter_finds_its_quantised_base_again(folder: Path, tmp_path: Path) -> None:
    model = dsub.attach(dsub.load_frozen(folder, "fp8", dtype="float32"), dsub.SubspaceConfig(method="ssl"))
    with torch.no_grad():
        for parameter in dsub.trainable_parameters(model):
            parameter.normal_(std=0.05)
    dsub.save_adapter(model, tmp_path / "adapter")
    again = load_adapted(tmp_path / "adapter")
    assert operators(again, "fp8").keys() == operators(model, "fp8").keys() and len(operators(model, "fp8")) == 7
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_the_original_is_what_the_codes_stand_for(folder: Path, tmp_path: Path) -> None:
    """Merged onto the checkpoint's own weights, a method that has not changed anything gives these."""
    model = dsub.attach(dsub.load_frozen(folder, "nf4", dtype="float32"), dsub.SubspaceConfig(method="lora", rank=4))
    dsub.merge(model, tmp_path / "merged", base="original", dtype="float32")
    merged, expected = load_file(tmp_path / "merged" / FILE), dequantised(folder)
    assert all(torch.equal(merged[key], expected[key]) for key in matrices(expected))


def test_a_changed_scale_is_another_base(folder: Path, tmp_path: Path) -> None:
    other = rewritten(folder, changed(f"{KEY}_scale_inv", lambda t: t * 1.5), tmp_path / "other")
    same = rewritten(folder, lambda t: None, tmp_path / "same")
    assert base_fingerprint(folder) == base_fingerprint(same) != base_fingerprint(other)


def test_it_is_the_files_own_index_where_nothing_is_quantised(folder: Path) -> None:
    index = open_checkpoint(folder)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    assert decoded_index(index, None, model, torch.bfloat16) is index
    seen = decoded_index(index, FP8, model, torch.bfloat16)
    assert set(seen) == {key for key in index if not key.endswith("_scale_inv")} and seen.in_file is index
    assert seen.types[KEY] == "BF16" and seen.size(KEY) == 320 * 192 + 4 * 3 * 2
    assert decoded_index(index, FP8, model, torch.float16).types[KEY] == "F32"


@pytest.mark.parametrize("stage", [0, 2])
def test_engines_that_split_nothing_get_the_same(folder: Path, stage: int) -> None:
    from tests.ranks import run_on_ranks

    (first, second) = run_on_ranks(2, summed, str(folder), stage)
    expected = operators(dsub.load_frozen(folder, "fp8"), "fp8")
    assert first == second == {name: int(module.codes.long().sum()) for name, module in expected.items()}


def summed(folder: str, stage: int) -> dict[str, int]:
    from tests.matrix import tiny

    model = dsub.load_frozen(folder, "fp8", deepspeed=tiny.ds_config(stage, world_size=2))
    return {name: int(module.codes.long().sum()) for name, module in operators(model, "fp8").items()}
