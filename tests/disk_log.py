"""What a machine that loses its power may find on its disk: a process's calls recorded, and the states that POSIX allows.

    with DiskLog(folder) as log:                  # every file and folder below it is watched
        ...                                       # the product at work
        log.say("saved")                          # what it has promised by now
    for state in log.states():                    # each disk that a crash at any moment may leave
        state.write(elsewhere)                    # as files, for the product's own readers
        assert "saved" not in state.said or ...

Recorded are what changed under the folder, whoever changed it (other languages' libraries too: the folder is looked at before
and after each call), and which files and folders were synced. Nothing is replaced: each call is made as it was asked for.

The model: a file's bytes are certain up to its last fsync; those after it may be there, be missing, or be zeros. A name in a
folder (created, renamed, removed) is certain once the folder is synced; of the changes since then any may be on disk without
the others, as far as each can be made alone. A rename is made whole or not at all.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = 0  # the number of the watched folder itself
WATCHED = ("fsync", "fdatasync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink")
Entries = dict[int, dict[str, int]]  # folder -> name -> file or folder; all by number
Matters = Callable[[str], bool]  # of a name
Unsynced = Callable[[bytes, bytes], bytes]  # what is certain of a file and what was written -> what may be found


@dataclass(frozen=True)
class Change:
    """One change of names: from one place to another (a rename), out of nothing (a creation), or into nothing."""

    node: int
    source: tuple[int, str] | None
    target: tuple[int, str] | None

    @property
    def places(self) -> set[tuple[int, str]]:
        return {place for place in (self.source, self.target) if place is not None}

    @property
    def folders(self) -> set[int]:
        return {folder for folder, _ in self.places}

    def make(self, entries: Entries) -> None:
        """In these entries, if it can be made there: what is moved or removed is there, and no full folder is in the way. A
        folder that is removed is gone with whatever is in it: it was emptied before."""
        if self.source is not None and entries.get(self.source[0], {}).get(self.source[1]) != self.node:
            return
        if self.target is not None and entries.get(entries.get(self.target[0], {}).get(self.target[1], -1)):
            return
        if self.source is not None:
            del entries[self.source[0]][self.source[1]]
        if self.target is not None:
            entries.setdefault(self.target[0], {})[self.target[1]] = self.node


@dataclass(frozen=True)
class Written:
    node: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    node: int


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class State:
    """One disk that may be found: files by path (None: a folder), those whose bytes were not certain, what was promised."""

    files: dict[str, bytes | None]
    uncertain: tuple[str, ...]
    said: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for path, content in self.files.items():
            if content is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(content)
        return folder


@dataclass
class _Disk:
    """What is certain, and what is not yet."""

    folders: set[int] = field(default_factory=lambda: {ROOT})
    entries: Entries = field(default_factory=dict)
    waiting: list[Change] = field(default_factory=list)
    content: dict[int, bytes] = field(default_factory=dict)
    certain: dict[int, bytes] = field(default_factory=dict)

    def take(self, event: Change | Written | Synced | Said) -> None:
        if isinstance(event, Change):
            self.waiting.append(event)
        elif isinstance(event, Written):
            self.content[event.node] = event.content
        elif isinstance(event, Synced) and event.node in self.folders:
            self._settle(event.node)
        elif isinstance(event, Synced):
            self.certain[event.node] = self.content.get(event.node, b"")

    def _settle(self, folder: int) -> None:
        """The folder's names are on disk. What they came from elsewhere is settled with them."""
        settled: list[Change] = []
        for change in self.waiting:
            if folder in change.folders:
                settled += [*self._before(change, settled), change]
        for change in self.waiting:
            if change in settled:
                change.make(self.entries)
        self.waiting = [change for change in self.waiting if change not in settled]

    def _before(self, change: Change, known: list[Change]) -> list[Change]:
        """The waiting changes that this one is made upon."""
        needed: list[Change] = []
        for earlier in reversed(self.waiting[: self.waiting.index(change)]):
            if earlier not in known and any(earlier.places & later.places for later in (change, *needed)):
                needed.append(earlier)
        return needed

    def choices(self) -> Iterator[Entries]:
        """The names that may be there: up to each change, all but one of them, one of them and what it needs."""
        count = len(self.waiting)
        chosen = [self.waiting[:n] for n in range(count + 1)]
        chosen += [self.waiting[:n] + self.waiting[n + 1 :] for n in range(count)]
        for change in self.waiting:
            needed = [*self._before(change, []), change]
            chosen.append([one for one in self.waiting if one in needed])
        once = {tuple(map(id, changes)): changes for changes in chosen}
        for changes in once.values():
            entries = {folder: dict(names) for folder, names in self.entries.items()}
            for change in changes:
                change.make(entries)
            yield entries

    def files(self, entries: Entries, matters: Matters, unsynced: Unsynced) -> tuple[dict[str, Any], list[str]]:
        """The files that these names lead to, by path, and those whose bytes are not certain."""
        files: dict[str, bytes | None] = {}
        uncertain: list[str] = []
        below = [("", ROOT)]
        while below:
            path, folder = below.pop()
            for name, node in entries.get(folder, {}).items():
                own = f"{path}{name}"
                if not matters(name):
                    continue
                if node in self.folders:
                    files[own] = None
                    below.append((f"{own}/", node))
                    continue
                now, certain = self.content.get(node, b""), self.certain.get(node, b"")
                files[own] = now if now == certain else unsynced(certain, now)
                if now != certain:
                    uncertain.append(own)
        return files, uncertain


def _lost(certain: bytes, now: bytes) -> bytes:
    """What was appended is missing; a file that was written anew in its place is empty, as it was when it was opened."""
    return certain if now.startswith(certain) else b""


def _there(certain: bytes, now: bytes) -> bytes:
    return now


def _zeros(certain: bytes, now: bytes) -> bytes:
    return certain + bytes(max(0, len(now) - len(certain)))


class DiskLog:
    """Records while it is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events: list[Change | Written | Synced | Said] = []
        self._folders = {ROOT}
        self._numbers = itertools.count(1)
        self._known: dict[int, int] = {}  # inode -> number, for as long as it is there
        self._stamps: dict[int, tuple[int, ...]] = {}
        self._entries: Entries = {ROOT: {}}
        self._lock = threading.RLock()
        self._before: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._before = {name: getattr(os, name) for name in WATCHED}
        self._look()
        for number in (*self._folders, *self._known.values()):  # what was there at the beginning is on disk
            self._events.append(Synced(number))
        for name, call in self._before.items():
            setattr(os, name, self._watched(name, call))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, call in self._before.items():
            setattr(os, name, call)
        self._look()

    def say(self, text: str) -> None:
        """A promise that was made by now."""
        with self._lock:
            self._look()
            self._events.append(Said(text))

    def states(self, matters: Matters = lambda name: True) -> Iterator[State]:
        """Every state that differs, in files or in what was said, from those before it.

        Arguments:
            matters: of a file's or folder's name: whether it belongs to a state, with what lies below it.
        """
        disk, said, seen = _Disk(folders=self._folders), [], set()
        for event in (*self._events, Said("the end")):
            if isinstance(
                event, Synced | Said
            ):  # what may be found before it, may be found between any two before that
                for state in _states(disk, tuple(said), matters):
                    key = (frozenset(state.files.items()), state.said)
                    if key not in seen:
                        seen.add(key)
                        yield state
            if isinstance(event, Said):
                said.append(event.text)
            disk.take(event)

    def _watched(self, name: str, call: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._look()
                result = call(*args, **kwargs)
                if name in ("fsync", "fdatasync"):
                    inode = os.fstat(args[0] if isinstance(args[0], int) else args[0].fileno()).st_ino
                    number = ROOT if inode == self.folder.stat().st_ino else self._known.get(inode)
                    self._events += [] if number is None else [Synced(number)]
                else:
                    self._look()
                return result

        return made

    def _look(self) -> None:
        """Record what is other than at the last look."""
        found: Entries = {}
        inodes: set[int] = set()
        changed: list[Written] = []
        below = [(ROOT, self.folder)]
        while below:
            number, path = below.pop()
            found[number] = {}
            for entry in os.scandir(path):
                try:
                    stat = entry.stat(follow_symlinks=False)
                    own = self._known.setdefault(stat.st_ino, -1)
                    own = self._known[stat.st_ino] = next(self._numbers) if own < 0 else own
                    inodes.add(stat.st_ino)
                    found[number][entry.name] = own
                    if entry.is_dir(follow_symlinks=False):
                        self._folders.add(own)
                        below.append((own, Path(entry.path)))
                    elif self._stamps.get(own) != (stamp := (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)):
                        changed.append(Written(own, Path(entry.path).read_bytes()))
                        self._stamps[own] = stamp
                except FileNotFoundError:
                    continue
        self._known = {inode: number for inode, number in self._known.items() if inode in inodes}
        self._events += [*changed, *_changes(self._entries, found)]
        self._entries = found


def _changes(before: Entries, after: Entries) -> list[Change]:
    """From one look to the next; between two there is at most one call that renames or removes."""
    gone = {(f, n): node for f, names in before.items() for n, node in names.items() if after.get(f, {}).get(n) != node}
    new = {(f, n): node for f, names in after.items() for n, node in names.items() if before.get(f, {}).get(n) != node}
    left = dict(gone)
    made: list[Change] = []
    for place, node in new.items():
        source = next((where for where, what in left.items() if what == node), None)
        if source is not None:
            del left[source]
        made.append(Change(node, source, place))
    over = {change.target for change in made}  # a file that was renamed upon is gone with the rename
    return [Change(node, place, None) for place, node in left.items() if place not in over] + made


def _states(disk: _Disk, said: tuple[str, ...], matters: Matters) -> Iterator[State]:
    for entries in disk.choices():
        for unsynced in (_there, _lost, _zeros):
            files, uncertain = disk.files(entries, matters, unsynced)
            yield State(files, tuple(uncertain), said)
            if not uncertain:
                break
