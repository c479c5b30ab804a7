"""Model folders whose weights are quantised: written by transformers and bitsandbytes, or by the formulas of their quantisers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.load import bytes_read
from dist_subspace.placement.collectives import world
from dist_subspace.placement.deepspeed.shards import kept
from dist_subspace.storage import FrozenLinear
from tests.matrix import tiny
from tests.tiny_models import tiny_model

FILE = "model.safetensors"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
Tensors = dict[str, Tensor]
# Weights of more than one block of 256 x 64, whose sides are no multiples of 128. bitsandbytes' kernel for CPUs decodes
# rows wrongly that are no multiple of 64 wide.
SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_key_value_heads": 4}


def save_plain(folder: Path, **sizes: Any) -> Path:
    """A LLaMA in bfloat16."""
    tiny_model(**(SIZES | sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def by_transformers(folder: Path, **settings: Any) -> Any:
    """The model as transformers itself loads the folder."""
    arguments = {"dtype": torch.float32, "device_map": {"": "cpu"}} | settings
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def save_bitsandbytes(folder: Path, plain: Path | str, **settings: Any) -> Path:
    """A plain folder as bitsandbytes quantises it."""
    config = transformers.BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    by_transformers(Path(plain), quantization_config=config).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[Tensors], None], out: Path | None = None, **config: Any) -> Path:
    """The folder (or a copy of it) with other tensors, and other entries in config.json."""
    if out is not None:
        folder = Path(shutil.copytree(folder, out))
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def dropped(key: str) -> Callable[[Tensors], None]:
    """A change: the tensor is not there."""

    def apply(tensors: Tensors) -> None:
        del tensors[key]

    return apply


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """A change: the tensor is another."""

    def apply(tensors: Tensors) -> None:
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def matrices(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys of the linear layers in the blocks."""
    return [key for key in tensors if key.endswith("_proj.weight")]


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and factors: of each block the largest magnitude over 448."""
    rows, columns = weight.shape
    grid = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i, j in ((i, j) for i in range(grid.shape[0]) for j in range(grid.shape[1])):
        at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        own = weight[at].float()
        grid[i, j] = own.abs().max().clamp(min=1e-12) / LARGEST
        codes[at] = (own / grid[i, j]).clamp(-LARGEST, LARGEST).to(codes.dtype)
    return codes, grid


def factors(grid: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The factor of each entry."""
    spread = grid.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]


def held_part(folder: str, storage: str, names: dict[str, str], **arguments: Any) -> tuple[list[str], int, int]:
    """On a rank of ZeRO-3: the tensors of operators of which this rank's part is not the file's bytes, how many were compared,
    and the bytes that it read.

    Arguments:
        names: the operator's tensor -> what stands behind the layer's name in the file.
    """
    config = tiny.ds_config(3, world_size=world().size)
    model = load_frozen(folder, storage, dtype="float32", deepspeed=config, **arguments)
    file, wrong, compared = load_file(Path(folder) / FILE), [], 0
    for layer, operator in model.named_modules():
        if isinstance(operator, FrozenLinear) and operator.storage == storage:
            for name, ending in names.items():
                parameter = operator.get_parameter(name)
                shard, start = kept(parameter)
                expected = (
                    file[f"{layer}{ending}"].contiguous().view(-1).view(torch.int8)[start : start + shard.numel()]
                )
                compared += 1
                if not torch.equal(shard.view(-1)[: expected.numel()], expected):
                    wrong.append(f"{layer}.{name}")
    return wrong, compared, bytes_read(model)


def refusals(folders: list[str], storage: str) -> list[str | None]:
    """On a rank of ZeRO-3: what is said of each folder."""
    said: list[str | None] = []
    for folder in folders:
        try:
            load_frozen(folder, storage, dtype="float32", deepspeed=tiny.ds_config(3, world_size=world().size))
            said.append(None)
        except UsageError as error:
            said.append(str(error))
    return said


def operators(model: nn.Module, storage: str) -> dict[str, Any]:
    """The frozen operators in a storage, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and module.storage == storage
    }
