"""A model's weights, written one tensor at a time: files that safetensors reads, of a bounded size, in the plan's order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_subspace.errors import UsageError
from dist_subspace.interchange import weights
from dist_subspace.interchange.weights import Planned, WeightsWriter

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "c": torch.arange(8.0).view(4, 2).t(),
}


def write(
    folder: Path, tensors: dict[str, Tensor], most: int = 1 << 30, dtype: torch.dtype | None = None
) -> list[Planned]:
    plan = [Planned(key, tuple(t.shape), dtype or t.dtype) for key, t in tensors.items()]
    writer = WeightsWriter(folder, plan, most)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.finish()
    return plan


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in expected.items()
    )


def test_one_file_holds_every_tensor_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_files_are_of_at_most_the_size_and_a_larger_tensor_has_its_own(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 2, "c": 5, "d": 1, "e": 4}  # of 4 bytes each
    tensors = {key: torch.full((size,), float(size)) for key, size in sizes.items()}
    write(tmp_path, tensors, most=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1], "d": names[2], "e": names[2]}
    assert index["metadata"] == {"total_parameters": 15, "total_size": 60}
    assert same({k: v for name in names for k, v in load_file(tmp_path / name).items()}, tensors)
    write(tmp_path, {"large": torch.zeros(100), "small": torch.zeros(1)}, most=20)
    assert set(load_file(tmp_path / "model-00001-of-00002.safetensors")) == {"large"}


def test_a_tensor_is_written_in_the_plans_type_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE", 4)
    write(tmp_path, {"a": TENSORS["a"], "c": TENSORS["c"]}, dtype=torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert same(found, {key: TENSORS[key].to(torch.bfloat16) for key in ("a", "c")})


def test_a_value_that_the_type_cannot_hold_is_refused_and_infinity_is_one_that_it_can(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^a has values that float16 cannot hold; accepted: a wider dtype$"):
        write(tmp_path, {"a": torch.tensor([1.0, 1e6])}, dtype=torch.float16)
    write(tmp_path, {"a": torch.tensor([1.0, float("-inf"), float("nan")])}, dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["a"].isinf().tolist() == [False, True, False]


def test_another_order_or_shape_than_the_plans_is_a_fault(tmp_path: Path) -> None:
    plan = [Planned("a", (2,), torch.float32), Planned("b", (2,), torch.float32)]
    writer = WeightsWriter(tmp_path, plan, 1 << 30)
    with pytest.raises(RuntimeError, match="is written where"):
        writer.write("b", torch.zeros(2))
    writer.write("a", torch.zeros(2))
    with pytest.raises(RuntimeError, match="is written where"):
        writer.write("b", torch.zeros(3))
    with pytest.raises(RuntimeError, match="b was planned and not written"):
        writer.finish()
    writer.abandon()


def test_a_file_that_was_cut_is_found_at_the_end(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, [Planned("a", (2,), torch.float32)], 1 << 30)
    writer.write("a", torch.zeros(2))
    writer._close()
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="does not read back as it was written"):
        writer.finish()
