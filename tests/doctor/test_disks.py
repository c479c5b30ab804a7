"""What is found out about a folder by really writing, renaming and syncing there; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dist_subspace.doctor import disks, mounts
from dist_subspace.doctor.disks import EACH_NODE, RANK_0, Use


def use(path: Path, writes: str | None = RANK_0, must_exist: bool = False) -> Use:
    return Use("run folder", str(path), writes, "run.output_dir", must_exist)


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above_it_and_nothing_is_left(tmp_path: Path) -> None:
    found = disks.examine([use(tmp_path / "runs" / "one")], "abc", 3)
    assert found[0]["folder"] == str(tmp_path) and not found[0]["exists"]
    assert found[0]["refused"] is None and found[0]["rename"] is None and found[0]["sync"]["seconds"] >= 0
    assert disks.marks_seen(found, "abc", [0, 3]) == [[3]]
    disks.remove_marks(found, "abc", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_mark_of_another_visit_is_none(tmp_path: Path) -> None:
    found = disks.examine([use(tmp_path)], "abc", 0)
    disks.remove_marks(found, "abc", 0)
    (tmp_path / f"{disks.MARK}abc-0").write_text("older")
    assert disks.marks_seen(found, "abc", [0]) == [[]]


def test_what_is_only_read_is_not_written_to_and_is_told_from_another(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    os.link(tmp_path / "a", tmp_path / "d")
    before = sorted(tmp_path.iterdir())
    a, b, c, d = disks.examine([use(tmp_path / name, None) for name in "abcd"], "abc", 0)
    assert sorted(tmp_path.iterdir()) == before
    assert a["content"] == c["content"] != b["content"]
    assert a["same"] == d["same"] != c["same"]


def test_a_file_that_disappears_while_it_is_replaced_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose rename is a copy."""

    def slow(source: Path, target: Path) -> None:
        target.unlink()
        time.sleep(0.001)
        shutil.copy(source, target)

    assert disks.try_renames(tmp_path) is None
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(os, "replace", slow)
    assert (disks.try_renames(tmp_path / "again") or "").startswith("a reader ")


def test_a_full_disk_and_one_that_is_read_only_refuse(tmp_path: Path) -> None:
    """Real disks, in a namespace of their own."""
    script = (
        "import json, sys\nfrom dist_subspace.doctor.disks import Use, examine\n"
        "found = examine([Use('a', sys.argv[1], 'each node'), Use('b', sys.argv[2], 'each node')], 't', 0)\n"
        "print(json.dumps([[f['refused'], f['mount']['kind'], 'ro' in f['mount']['options'].split(',')] for f in found]))\n"
    )
    full, readonly = tmp_path / "full", tmp_path / "read only"
    full.mkdir(), readonly.mkdir()
    shell = (
        'mount -t tmpfs -o size=4k tmpfs "$0" && mount -t tmpfs -o ro tmpfs "$1" && '
        '{ head -c 8000 /dev/zero > "$0/x" 2>/dev/null; python -c "$2" "$0" "$1"; }'
    )
    command = ["unshare", "-m", "--propagation", "private", "bash", "-c", shell, str(full), str(readonly), script]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, to mount disks")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == (
        '[["No space left on device", "tmpfs", false], ["Read-only file system", "tmpfs", true]]'
    ), done.stderr


def test_the_mount_of_a_folder_is_the_one_that_is_nearest() -> None:
    found = mounts.mount_of(Path("/proc/self"))
    assert found is not None and (found.kind, found.at, found.is_network) == ("proc", "/proc", False)
    assert mounts.Mount("nfs4", "server:/home", "/home", "rw").is_network
    assert use(Path("x"), EACH_NODE).writes == "each node"
