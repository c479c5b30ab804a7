"""The allocator's setting: made where there is a GPU and nobody has chosen, before torch is there to read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_subspace.cuda_allocator import NAMES, let_segments_grow
from tests.ranks import ROOT

# What the environment is when torch comes.
SCRIPT = """
import json, os, sys
from pathlib import Path

def seen(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(json.dumps(dict(os.environ)), flush=True)
        os._exit(0)

from dist_subspace import cuda_allocator
cuda_allocator.DRIVER = Path(sys.argv[1])
sys.addaudithook(seen)
from dist_subspace.cli import main
main(["train", "none.yaml"])
"""


def test_segments_grow_where_there_is_a_driver_and_no_choice(tmp_path: Path) -> None:
    chosen: dict[str, str] = {}
    let_segments_grow(chosen, tmp_path / "absent")
    assert chosen == {}
    let_segments_grow(chosen, tmp_path)
    assert chosen == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", NAMES)
def test_a_users_own_setting_stays(name: str, tmp_path: Path) -> None:
    chosen = {name: "max_split_size_mb:128"}
    let_segments_grow(chosen, tmp_path)
    assert chosen == {name: "max_split_size_mb:128"}


def test_the_command_line_chooses_before_torch_is_imported(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1])["PYTORCH_ALLOC_CONF"] == "expandable_segments:True", done.stderr
