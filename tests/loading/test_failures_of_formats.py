"""What cannot be read, in every format and in experts that become a stack: one sentence, the same on every rank, at once."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.loading.stream import Stream
from dist_subspace.placement.collectives import world
from tests.loading.folders_of_formats import FORMATS, SECOND, in_two_files
from tests.matrix import tiny
from tests.ranks import run_on_ranks

SECONDS = 30.0  # far below the minutes after which a rank is given up that waits in a collective


def cut(folder: Path) -> None:
    with (folder / SECOND).open("r+b") as file:
        file.truncate((folder / SECOND).stat().st_size - 100)


def without_a_file(folder: Path) -> None:
    (folder / SECOND).unlink()


def a_link_to_nothing(folder: Path) -> None:
    without_a_file(folder)
    (folder / SECOND).symlink_to("../../blobs/0123456789")


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A change of the largest tensor of the second file."""
    tensors = load_file(folder / SECOND)
    key = max(tensors, key=lambda key: (".embed" not in key and "lm_head" not in key, tensors[key].nbytes))
    save_file(tensors | {key: change(tensors[key]).contiguous()}, folder / SECOND, metadata={"format": "pt"})


def of_another_type(folder: Path) -> None:
    rewrite(folder, lambda tensor: torch.ones(tensor.shape, dtype=torch.int32))


def of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda tensor: tensor.view(torch.uint8)[:2].clone().view(tensor.dtype))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, r"-00002-of-00002\.safetensors is no whole safetensors file \(.*\); copy or download it again"),
    "without a file": (without_a_file, r"index\.json names model-00002-\S+, which is not in the folder"),
    "a link to nothing": (a_link_to_nothing, r"is a link to \.\./\.\./blobs/\d+, where nothing is"),
    "another type": (of_another_type, r"\b(int32|I32)\b"),
    "another shape": (of_another_shape, r"config\.json asks for|expected|does not fit|cannot become"),
}


def outcomes(trials: list[list[str]], storage: str) -> list[tuple[str, float]]:
    """For each trial what this rank says of its folder, and after how many seconds."""
    said = []
    for folders in trials:
        began = time.monotonic()
        try:
            load_frozen(folders[world().rank], storage, deepspeed=tiny.ds_config(3, world_size=world().size))
            said.append(("loaded", time.monotonic() - began))
        except UsageError as error:
            said.append((str(error), time.monotonic() - began))
    return said


def one_sentence(found: list[tuple[str, float]]) -> str:
    """What all ranks said."""
    assert len({said for said, _ in found}) == 1 and max(seconds for _, seconds in found) < SECONDS, found
    assert "\n" not in found[0][0], found
    return found[0][0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_rank_says_the_same_of_what_a_folder_lacks(name: str, tmp_path: Path) -> None:
    """Each damage in the folder of both ranks, and then in that of the last rank alone."""
    storage, make = FORMATS[name]
    whole = in_two_files(make(tmp_path / "whole"))
    trials = []
    for damage, (break_it, _) in DAMAGES.items():
        broken = Path(shutil.copytree(whole, tmp_path / damage))
        break_it(broken)
        trials += [[str(broken)] * 2, [str(whole), str(broken)]]
    ranks = run_on_ranks(2, outcomes, [[str(whole)] * 2, *trials], storage)
    said = [one_sentence(list(found)) for found in zip(*ranks, strict=True)]
    assert said[0] == "loaded"
    for (damage, (_, pattern)), both, alone in zip(DAMAGES.items(), said[1::2], said[2::2], strict=True):
        assert re.search(pattern, both) and both == alone, (damage, both, alone)


def shortened(folders: list[str], storage: str) -> tuple[str, float]:
    """What a rank says in whose load a file of the last rank is cut behind its header, after all has been checked."""
    folder, began, real = Path(folders[world().rank]), time.monotonic(), Stream.run

    def run(self: Stream, *arguments: Any) -> None:
        with (folder / SECOND).open("rb") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little")
        if world().rank == 1:
            os.truncate(folder / SECOND, header)
        real(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "run", run)
        try:
            load_frozen(folder, storage, deepspeed=tiny.ds_config(3, world_size=world().size))
        except UsageError as error:
            return str(error), time.monotonic() - began
    return "loaded", time.monotonic() - began


@pytest.mark.parametrize("name", FORMATS)
def test_every_rank_says_that_a_file_of_one_has_become_shorter_while_it_was_read(name: str, tmp_path: Path) -> None:
    storage, make = FORMATS[name]
    whole = in_two_files(make(tmp_path / "whole"))
    own = shutil.copytree(whole, tmp_path / "own")
    said = one_sentence(run_on_ranks(2, shortened, [str(whole), str(own)], storage))
    assert re.search(rf"own/{SECOND} is cut short: it ends within \S+; copy or download it again", said), said
