"""What the disks' facts mean: which folder is shared, which cannot be written to, which is too small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_subspace.doctor.disks import AT_NEED, EACH_NODE, RANK_0
from dist_subspace.doctor.findings import DISK, REFUSED, REMARK, Finding
from dist_subspace.doctor.mounts import MEMORY, UNSAFE, Mount
from dist_subspace.doctor.needs import needs_text
from dist_subspace.doctor.ranks import Ranks, alike
from dist_subspace.doctor.sizes import size

KIND = "disks"
ALWAYS = 64 << 20  # bytes that any run writes: logs, metrics, a small adapter
COMFORTABLE = 1 << 30
FILES = 1000  # names that a run may need
TOO_FAST = 20e-6  # seconds for 64 KiB and a folder: no disk has them by then


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    for name, there in _by_name(ranks).items():
        shared = sharing(ranks, there, name)
        yield name, {rank: _text(use, shared.get(rank)) for rank, use in there.items()}


def judge(ranks: Ranks) -> Iterator[Finding]:
    for name, there in _by_name(ranks).items():
        yield from _absent(name, there)
        yield from _unlike(ranks, name, there)
        for rank, use in there.items():
            if use["writes"] is not None:
                yield from _refused(rank, use)
                yield from _unsafe(rank, use)
                yield from _too_small(ranks, rank, use, sharing(ranks, there, name).get(rank))


def sharing(ranks: Ranks, there: dict[int, Any], name: str) -> dict[int, str]:
    """For each node's first rank, with whom it shares the place: by marks that others see, else by what tells one file from
    another; empty where there is one node, or where it cannot be told."""
    found: dict[int, str] = {}
    if len(there) < 2:
        return found
    for rank, use in there.items():
        seen = _seen(ranks, rank, name) if use["writes"] is not None else None
        if seen is None or not any(_seen(ranks, rank, name) for rank in there):
            seen = [other for other, their in there.items() if their["same"] and their["same"] == use["same"]]
        if set(there) <= set(seen):
            found[rank] = "shared by all nodes"
        elif set(seen) - {rank}:
            found[rank] = f"shared with {', '.join(ranks.host(other) for other in seen if other != rank)}"
        elif seen:
            found[rank] = "the node's own"
    return found


def _seen(ranks: Ranks, rank: int, name: str) -> list[int] | None:
    """The ranks whose marks a rank sees at a place."""
    facts = ranks.facts[rank].get(KIND)
    marks = ranks.facts[rank].get("marks")
    if not isinstance(facts, list) or marks is None:
        return None
    return next((seen for use, seen in zip(facts, marks, strict=True) if use["name"] == name), None)


def _absent(name: str, there: dict[int, Any]) -> Iterator[Finding]:
    missing = tuple(rank for rank, use in there.items() if use["must_exist"] and not use["exists"])
    if missing:
        use = there[missing[0]]
        what = f"{use['field']} is {use['path']!r}, which is not there"
        yield Finding(
            KIND, name, missing, what, "copy it to the same path there, or put it on a disk of all nodes", REFUSED
        )


def _unlike(ranks: Ranks, name: str, there: dict[int, Any]) -> Iterator[Finding]:
    first, *others = alike({rank: use["content"] for rank, use in there.items() if use["content"] is not None}) or [
        (0, [])
    ]
    for content, places in others:
        what = f"{there[places[0]]['field']} is another file ({content}) than on {ranks.where(first[1])} ({first[0]})"
        yield Finding(KIND, name, tuple(places), what, "give every node the same file", REFUSED)


def _refused(rank: int, use: dict[str, Any]) -> Iterator[Finding]:
    """A place that cannot be written to, or renamed in."""
    refused = use["refused"] or (use["sync"] or {}).get("refused")
    breaks = use["writes"] == EACH_NODE or (use["writes"] == RANK_0 and rank == 0)
    if refused is not None:
        said = "cannot be written to" if use["refused"] else "does not bring what is written to the disk"
        later = (
            ""
            if breaks
            else {RANK_0: "; a run whose rank 0 is there stops", AT_NEED: "; nothing can be fetched into it"}[
                use["writes"]
            ]
        )
        what = f"{_named(use)} {said} ({refused}, {_mount(use)}){later}"
        do = (
            "make room"
            if "space" in refused
            else "let this user write there, mount it for writing, or name another folder"
        )
        yield Finding(KIND, use["name"], (rank,), what, _with_field(do, use), DISK, breaks)
    elif use["rename"] is not None:
        what = f"{_named(use)} is on a disk where renames are not atomic: {use['rename']} ({_mount(use)})"
        do = "name a folder on another disk: checkpoints would not be whole after a kill"
        yield Finding(KIND, use["name"], (rank,), what, _with_field(do, use), DISK, breaks and use["writes"] == RANK_0)


def _unsafe(rank: int, use: dict[str, Any]) -> Iterator[Finding]:
    """A place whose files may be gone after a crash of the machine; only of what shall last."""
    sync, options = use["sync"], set(use["mount"]["options"].split(","))
    if use["writes"] != RANK_0 or rank != 0 or sync is None or sync["refused"]:
        return
    why = None
    if use["mount"]["kind"] in MEMORY:
        why = f"is in memory ({use['mount']['kind']})"
    elif options & UNSAFE:
        why = f"is on a disk that is mounted with {', '.join(sorted(options & UNSAFE))}"
    elif sync.get("swallowed") or sync["seconds"] < TOO_FAST:
        why = f"is on a disk that says after {sync['seconds'] * 1e6:.0f} microseconds that 64 KiB are on it: fsync does nothing"
    if why is not None:
        what = f"{_named(use)} {why}, so that checkpoints are lost with the machine's power"
        yield Finding(
            KIND, use["name"], (rank,), what, _with_field("name a folder on a disk that lasts", use), REMARK, False
        )


def _too_small(ranks: Ranks, rank: int, use: dict[str, Any], shared: str | None) -> Iterator[Finding]:
    if use["writes"] == AT_NEED or (use["writes"] == RANK_0 and rank != 0) or use["refused"]:
        return
    needed, text = _needed(ranks, use)
    do = _with_field("make room, or name a folder on a larger disk", use)
    if use["free"] < needed:
        what = f"{_named(use)} has {size(use['free'])} free, and the run writes there {text}"
        yield Finding(KIND, use["name"], (rank,), what, do, DISK)
    elif use["free"] < needed + COMFORTABLE and use["writes"] == RANK_0:
        what = f"{_named(use)} has {size(use['free'])} free, and the run writes there {text}"
        yield Finding(KIND, use["name"], (rank,), what, do, DISK, breaks=False)
    if use["files free"] is not None and use["files free"] < FILES:
        what = f"the disk of {_named(use)} has room for {use['files free']} more files (df -i)"
        yield Finding(KIND, use["name"], (rank,), what, do, DISK, breaks=use["files free"] < FILES // 10)


def _needed(ranks: Ranks, use: dict[str, Any]) -> tuple[int, str]:
    """Bytes that will be written to a place, and their sum in words."""
    needs = (ranks.of("configuration").get(0) or {}).get("needs")
    if needs is None:
        return ALWAYS, f"at least {size(ALWAYS)}"
    if use["writes"] == EACH_NODE:
        return needs["tokens"] + ALWAYS, f"{size(needs['tokens'])} of tokens, and logs"
    written = needs["checkpoint"] if needs["run"] is None else needs["run"]
    return written + ALWAYS, needs_text(needs)


def _by_name(ranks: Ranks) -> dict[str, dict[int, Any]]:
    """The places by name, on the first rank of each node."""
    found, speakers = ranks.of(KIND), set(ranks.firsts().values())
    places: dict[str, dict[int, Any]] = {}
    for rank, uses in found.items():
        for use in uses if rank in speakers else []:
            places.setdefault(use["name"], {})[rank] = use
    return places


def _text(use: dict[str, Any], shared: str | None) -> str:
    words = [_mount(use) if use["exists"] or not use["must_exist"] else "absent"]
    words += [shared] if shared else []
    words.append(f"{size(use['free'])} free")
    if use["refused"]:
        words.append(f"not writable ({use['refused']})")
    elif use["rename"] is not None:
        words.append("renames not atomic")
    elif use["sync"] is not None and use["sync"]["seconds"] is not None:
        words.append(f"renames atomic, fsync {_duration(use['sync']['seconds'])}")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    """Roughly, so that nodes that differ by chance are said together."""
    if seconds < TOO_FAST:
        return "at once"
    return next((f"below {most} ms" for most in (10, 100) if seconds * 1000 < most), "above 100 ms")


def _mount(use: dict[str, Any]) -> str:
    mount = Mount(**use["mount"])
    read_only = " read-only" if "ro" in mount.options.split(",") else ""
    return f"{mount.kind or 'disk'}{read_only}" + (f" of {mount.source}" if mount.is_network else "")


def _named(use: dict[str, Any]) -> str:
    return f"{use['field']} ({use['path']})" if use["field"] else f"{use['path']} ({use['name']})"


def _with_field(do: str, use: dict[str, Any]) -> str:
    return f"{do} ({use['field']})" if use["field"] else do
