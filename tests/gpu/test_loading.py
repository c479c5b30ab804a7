"""A load onto the device: pieces wait in pinned memory, and what is packed of them there is what the whole matrix gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_subspace import load_frozen
from dist_subspace.loading import ranges
from dist_subspace.loading.index import open_checkpoint
from dist_subspace.loading.layout import Layout
from dist_subspace.loading.ranges import RangeReader
from dist_subspace.loading.read_ahead import ReadAhead, Wanted
from dist_subspace.placement.tensors import gathered
from dist_subspace.storage import FrozenLinear, pack
from tests.gpu.device import DEVICE
from tests.matrix import tiny
from tests.tiny_models import save_odd


def test_pieces_are_pinned_and_none_is_overwritten_while_it_is_copied(tmp_path: Path) -> None:
    """Copies wait behind a long kernel; the reader may go on only when they are made."""
    whole = torch.randn(40, 1 << 16)
    save_file({"a": whole}, tmp_path / "model.safetensors")
    layout, busy = Layout.of("a", whole.shape), torch.ones(4096, 4096, device=DEVICE)
    wanted = [Wanted(row, layout, row * whole.shape[1], (row + 1) * whole.shape[1]) for row in range(len(whole))]
    copies = []
    with RangeReader(open_checkpoint(tmp_path)) as reader, ReadAhead(reader, wanted, torch.device(DEVICE)) as ahead:
        for _, values in ahead:
            assert values.is_pinned()
            busy = torch.tanh(busy @ busy)
            copies.append(values.to(DEVICE, non_blocking=True))
    assert torch.equal(torch.stack(copies).cpu(), whole)


@pytest.mark.parametrize("stage", [None, 0, 3])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "fp8", "bf16"])
def test_what_is_packed_in_pieces_is_what_the_whole_gives(
    kind: str, stage: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 256)  # so that a matrix is many pieces
    folder = save_odd(tmp_path, "gpt2")
    storage, _, double = kind.partition("-")
    config = None if stage is None else tiny.ds_config(stage)
    model = load_frozen(folder, storage, double_quant=bool(double), dtype="bfloat16", deepspeed=config)
    file, compared = load_file(Path(folder) / "model.safetensors"), 0
    for module in model.modules():
        if isinstance(module, FrozenLinear) and module.storage == storage and module.origin is not None:
            matrix = file[module.origin.key].to(DEVICE)
            expected = pack(matrix, storage, transposed=module.conv1d, double_quant=bool(double))
            with gathered(module.parameters()):
                for name, parameter in expected.named_parameters():
                    own = module.get_parameter(name)
                    assert own.device.type == "cuda" and torch.equal(
                        own.view(torch.int8), parameter.view(torch.int8)
                    ), name
            assert module.plain_values() == pytest.approx(expected.plain_values(), rel=1e-6)
            compared += 1
    assert compared >= 8
