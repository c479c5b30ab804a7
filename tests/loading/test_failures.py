"""A checkpoint that cannot be read, on all ranks or on one: every rank leaves with the same one sentence, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import world
from tests.hub_server import hub_server
from tests.matrix import tiny
from tests.ranks import ROOT, free_port, rank_environment, run_on_ranks
from tests.tiny_models import odd_model

SECONDS = 30.0  # far below the minutes after which a rank is given up that waits in a collective
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A model in several files that every user may read."""
    with tempfile.TemporaryDirectory() as own:
        odd_model("llama").save_pretrained(own, max_shard_size="20KB")
        for file in (Path(own), *Path(own).iterdir()):
            file.chmod(0o755)
        yield Path(own)


def second(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def key_in(file: Path) -> str:
    return next(key for key, value in load_file(file).items() if value.dim() == 2)


def cut(folder: Path) -> None:
    file = second(folder)
    file.write_bytes(file.read_bytes()[:-100])


def without_a_file(folder: Path) -> None:
    second(folder).unlink()


def of_another_type(folder: Path) -> None:
    file = second(folder)
    tensors = load_file(file)
    save_file({name: value.long() for name, value in tensors.items()}, file, metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    file = second(folder)
    tensors = load_file(file)
    save_file(tensors | {key_in(file): torch.zeros(3, 5)}, file, metadata={"format": "pt"})


def a_link_to_nothing(folder: Path) -> None:
    file = second(folder)
    file.unlink()
    file.symlink_to("../../blobs/0123456789")


def another_folders_file(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../elsewhere/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file that is cut": (cut, r"\.safetensors is no whole safetensors file \(.*\); copy or download it again"),
    "a file that is not there": (without_a_file, r"index\.json names model-00002-\S+, which is not in the folder"),
    "weights of another type": (of_another_type, r" holds model\.\S+ as torch\.int64; accepted: a floating-point weight"),
    "a weight of another shape": (of_another_shape, r"\.safetensors holds \S+ as \[3, 5\], but config\.json asks for \["),
    "a link to nothing": (a_link_to_nothing, r"not in the folder \(\S+ is a link to \.\./\.\./blobs/\d+, where nothing is\)"),
    "a file outside": (another_folders_file, r"names \S+, which is outside the folder; accepted: files of the folder"),
}  # fmt: skip


def outcome(folders: list[str], stage: int, user: int | None = None) -> tuple[str, float]:
    """What a rank says that loads from its own folder, the last one as another user; and after how many seconds."""
    own, began = folders[min(world().rank, len(folders) - 1)], time.monotonic()
    if user is not None and world().rank == world().size - 1:
        os.seteuid(user)
    try:
        load_frozen(own, "nf4", deepspeed=tiny.ds_config(stage, world_size=world().size))
    except UsageError as error:
        return str(error), time.monotonic() - began
    finally:
        if user is not None:
            os.seteuid(0)
    return "loaded", time.monotonic() - began


def only_sentence(found: list[tuple[str, float]]) -> str:
    sentences = {sentence for sentence, _ in found}
    assert len(sentences) == 1 and max(seconds for _, seconds in found) < SECONDS, found
    (sentence,) = sentences
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), (3, 1)])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_says_the_same_of_a_damaged_folder(fault: str, ranks: int, stage: int, folder: Path) -> None:
    damage, sentence = FAULTS[fault]
    damage(folder)
    assert re.search(sentence, only_sentence(run_on_ranks(ranks, outcome, [str(folder)], stage)))


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (3, 3)])
def test_every_rank_says_what_one_alone_has_met(ranks: int, stage: int, folder: Path, tmp_path: Path) -> None:
    """The last rank's own copy is damaged; then it may not read the one that all have."""
    own = shutil.copytree(folder, tmp_path / "own")
    cut(own)
    folders = [str(folder)] * (ranks - 1) + [str(own)]
    assert "own/model-00002" in only_sentence(run_on_ranks(ranks, outcome, folders, stage))
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    second(folder).chmod(0o600)
    said = only_sentence(run_on_ranks(ranks, outcome, [str(folder)], stage, NOBODY))
    assert re.search(
        r"-00002-of-\S+ cannot be read \(Permission denied\); accepted: a file that this user may read", said
    )
    folder.chmod(0o700)
    said = only_sentence(run_on_ranks(ranks, outcome, [str(folder)], stage, NOBODY))
    assert said == f"model.path is {str(folder)!r}, which cannot be read here (Permission denied)"


WORKER = """
import sys
from dist_subspace import load_frozen
from dist_subspace.errors import UsageError
try:
    load_frozen(sys.argv[1], "nf4", deepspeed={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
except UsageError as error:
    print("said:", error)
"""


@pytest.mark.slow
def test_every_rank_says_that_the_disk_of_one_gives_an_error(folder: Path) -> None:
    """The system's own error, made by strace for one process: it reads a file's beginning, and then no more."""
    file, port = second(folder), free_port()
    fail = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-P", str(file), "-e", "trace=preadv,preadv2"]
    fail += ["-e", "inject=preadv,preadv2:error=EIO"]
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command = [sys.executable, "-c", WORKER, str(folder)]
    processes = [
        subprocess.Popen(
            [*(fail if rank else []), *command],
            env=rank_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = {process.communicate(timeout=240)[0].strip() for process in processes}
    finally:
        for process in processes:
            process.kill()
    assert said == {f"said: {file} cannot be read (Input/output error); copy or download it again"}


FETCH = """
import sys
from dist_subspace.errors import UsageError
from dist_subspace.loading import hub
try:
    print(hub.fetch("own/model", "model.path"))
except UsageError as error:
    print(error)
"""


def test_a_disk_that_is_full_in_the_middle_of_a_download_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    """A real disk, in a namespace of its own, that takes half of the model."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    home = tmp_path / "home"
    home.mkdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    shell = f'mount -t tmpfs -o size={size // 2048}k tmpfs "$0" && exec "$1" -c "$2"'
    command = ["unshare", "-m", "--propagation", "private", "bash", "-c", shell, str(home), sys.executable, FETCH]
    with hub_server() as hub:
        hub.add("own/model", folder)
        environment = hub.environment(home, PYTHONPATH=str(ROOT))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    (line,) = done.stdout.splitlines()
    assert re.search(
        r"^model\.path is 'own/model', which is not here, and \S+ did not give it to \S+ in 1 try \(No space left on device: "
        r"\S+ has 0\.0 GiB free\); accepted: another HF_HOME, or space in this one$",
        line,
    ), line


@pytest.mark.slow
def test_both_processes_of_a_node_say_that_its_disk_is_full(folder: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    home = tmp_path / "home"
    home.mkdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    mount = f'mount -t tmpfs -o size={size // 2048}k tmpfs "$0" && '
    both = 'for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank "$1" -c "$2" own/model & done; wait'
    command = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        "bash",
        "-c",
        mount + both,
        str(home),
        sys.executable,
        WORKER,
    ]
    with hub_server() as hub:
        hub.add("own/model", folder)
        of_hub = {name: value for name, value in hub.environment(home).items() if name.startswith(("HF_", "NO_"))}
        environment = rank_environment(0, 2, free_port()) | {"HF_HUB_OFFLINE": "0"} | of_hub
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    first, second = (line for line in done.stdout.splitlines() if line.startswith("said: "))
    assert first == second and "(No space left on device: " in first, done.stdout + done.stderr
