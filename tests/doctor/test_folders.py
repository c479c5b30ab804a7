"""What the disks' facts mean for a run: who may write, who shares, what fits."""

from __future__ import annotations

from typing import Any

from dist_subspace.doctor.folders import judge, sharing
from dist_subspace.doctor.ranks import Ranks
from tests.doctor.facts import ranks_of, sentences

GIB = 1 << 30
MOUNT = {"kind": "ext4", "source": "/dev/sda", "at": "/", "options": "rw"}


def place(**changes: Any) -> dict[str, Any]:
    found = {
        "name": "run folder",
        "path": "/runs/a",
        "writes": "rank 0",
        "field": "run.output_dir",
        "must_exist": False,
    }
    found |= {"exists": True, "folder": "/runs", "content": None, "same": None, "mount": MOUNT, "free": 100 * GIB}
    found |= {"total": 200 * GIB, "files free": 10**6, "refused": None, "rename": None}
    return found | {"sync": {"refused": None, "seconds": 0.004, "swallowed": False}} | changes


def seen(*facts: dict[str, Any], marks: list[list[int]] | None = None, **others: list[Any]) -> Ranks:
    if marks is not None:
        others["marks"] = [[mark] for mark in marks]
    return ranks_of("disks", [[found] for found in facts], **others)


def said(ranks: Ranks, breaks: bool = True) -> list[str]:
    return sentences(ranks, judge(ranks), breaks)


def test_a_good_disk_is_no_finding() -> None:
    assert said(seen(place(), place())) == said(seen(place(), place()), breaks=False) == []


def test_only_rank_0_must_be_able_to_write_the_run() -> None:
    refused = place(refused="Read-only file system")
    assert said(seen(refused, place())) == [
        "node1 (rank 0): run.output_dir (/runs/a) cannot be written to (Read-only file system, ext4)"
    ]
    assert said(seen(place(), refused)) == []
    assert len(said(seen(place(), refused), breaks=False)) == 1
    local = place(name="folder on the node", writes="each node", refused="Permission denied", field="run.local_dir")
    assert len(said(seen(local, local))) == 2
    assert said(seen(place(name="hub cache", writes="at need", refused="Permission denied", field=None))) == []


def test_a_disk_that_does_not_sync_or_rename_is_named() -> None:
    failing = place(sync={"refused": "Input/output error", "seconds": None})
    assert "does not bring what is written to the disk (Input/output error" in said(seen(failing))[0]
    assert "renames are not atomic: a reader found no file" in said(seen(place(rename="a reader found no file")))[0]


def test_files_that_a_crash_takes_along_are_a_remark() -> None:
    for changes, why in (
        ({"mount": MOUNT | {"kind": "tmpfs"}}, "is in memory (tmpfs)"),
        ({"mount": MOUNT | {"options": "rw,nobarrier"}}, "is on a disk that is mounted with nobarrier"),
        ({"sync": {"refused": None, "seconds": 1e-6}}, "fsync does nothing"),
    ):
        ranks = seen(place(**changes), place(**changes))
        assert said(ranks) == [] and len(said(ranks, breaks=False)) == 1 and why in said(ranks, breaks=False)[0]


def test_free_space_is_compared_with_what_the_run_writes() -> None:
    needs = {"checkpoint": GIB, "checkpoints": 4, "adapter": 0, "factors": 0, "tokens": 0, "run": 4 * GIB}
    told = [{"needs": needs}, {"needs": None}]
    for free, breaking, remarks in ((3 * GIB, 1, 0), (4 * GIB + (70 << 20), 0, 1), (10 * GIB, 0, 0)):
        ranks = seen(place(free=free), place(free=0), configuration=told)
        assert (len(said(ranks)), len(said(ranks, breaks=False))) == (breaking, remarks), free
    found = said(seen(place(free=3 * GIB), place(), configuration=told))[0]
    assert "has 3 GiB free, and the run writes there up to 4 GiB: 4 checkpoints of 1 GiB" in found
    assert len(said(seen(place(free=1 << 20)))) == 1, "without a configuration a run writes something all the same"
    assert "has room for 5 more files" in said(seen(place(**{"files free": 5})))[0]


def test_tokens_must_fit_on_each_node() -> None:
    told = [{"needs": {"tokens": GIB, "run": None, "checkpoint": 0}}, {}]
    local = {"name": "folder on the node", "writes": "each node", "field": "run.local_dir"}
    ranks = seen(place(**local), place(**local, free=GIB), configuration=told)
    assert [found.ranks for found in judge(ranks) if found.breaks] == [(1,)]


def test_files_that_are_absent_or_other_on_a_node_are_named() -> None:
    data = {"name": "data", "writes": None, "field": "data.train", "must_exist": True, "sync": None}
    there, absent = place(**data, content="a"), place(**data, exists=False)
    assert said(seen(there, there, absent)) == ["node3 (rank 2): data.train is '/runs/a', which is not there"]
    assert said(seen(there, there, place(**data, content="b"))) == [
        "node3 (rank 2): data.train is another file (b) than on node1, node2 (ranks 0, 1) (a)"
    ]


def test_who_shares_a_folder_is_told_by_marks_and_of_files_by_what_they_are() -> None:
    def shared(ranks: Ranks, name: str = "run folder") -> dict[int, str]:
        there = {rank: facts["disks"][0] for rank, facts in ranks.facts.items()}
        return sharing(ranks, there, name)

    three = [place(), place(), place()]
    assert set(shared(seen(*three, marks=[[0, 1, 2]] * 3)).values()) == {"shared by all nodes"}
    assert shared(seen(*three, marks=[[0, 1], [0, 1], [2]])) == {
        **{0: "shared with node2", 1: "shared with node1"},
        2: "the node's own",
    }
    files = [place(writes=None, same=same) for same in ("x", "x", "y")]
    assert shared(seen(*files, marks=[[], [], []]))[2] == "the node's own"
    assert shared(seen(*files, marks=[[], [], []]))[0] == "shared with node2"
    assert shared(seen(place())) == {}
