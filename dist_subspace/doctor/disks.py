"""The folders that a run uses, on each node: there, writable, shared or the node's own, safe to rename in, large enough."""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_subspace.doctor.mounts import Mount, mount_of

RANK_0, EACH_NODE, AT_NEED = "rank 0", "each node", "at need"
MARK = ".dist-subspace-doctor-"
REPLACES, READS = 200, 100  # at least so many replacements of a file, under the eyes of a reader that read it so often
SYNCS = 5


@dataclass(frozen=True)
class Use:
    """A folder, or a file, that a run uses.

    name: as the table calls it; path: absolute; writes: who writes there: RANK_0, EACH_NODE, AT_NEED (who fetches something), or
    None; field: the key of the configuration that names it, where there is one; must_exist: whether it has to be there already.
    """

    name: str
    path: str
    writes: str | None
    field: str | None = None
    must_exist: bool = False


def examine(uses: list[Use], token: str, rank: int) -> list[dict[str, Any]]:
    """Facts about each place on this node. Leaves a mark in each folder that is written to; `remove_marks` takes them away."""
    return [_examine(use, token, rank) for use in uses]


def _examine(use: Use, token: str, rank: int) -> dict[str, Any]:
    path = Path(use.path)
    folder = nearest_folder(path)
    found: dict[str, Any] = asdict(use) | {"exists": path.exists(), "folder": str(folder), "content": None}
    found["mount"] = asdict(mount_of(folder) or Mount("", "", "", ""))
    usage, names = shutil.disk_usage(folder), os.statvfs(folder)
    found |= {"free": usage.free, "total": usage.total, "files free": names.f_favail if names.f_files else None}
    found["same"] = _same(path)
    if path.is_file():
        found["content"] = _content(path)
    if use.writes is None:
        return found | {"refused": None, "rename": None, "sync": None}
    try:
        (folder / f"{MARK}{token}-{rank}").write_text(token)
    except OSError as error:
        with suppress(OSError):
            (folder / f"{MARK}{token}-{rank}").unlink()
        return found | {"refused": error.strerror or str(error), "rename": None, "sync": None}
    with tempfile.TemporaryDirectory(prefix=MARK, dir=folder, ignore_cleanup_errors=True) as inside:
        try:
            return found | {"refused": None, "rename": try_renames(Path(inside)), "sync": _try_sync(Path(inside))}
        except OSError as error:
            return found | {"refused": error.strerror or str(error), "rename": None, "sync": None}


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def marks_seen(found: list[dict[str, Any]], token: str, ranks: list[int]) -> list[list[int]]:
    """For each place of `examine`, the ranks whose mark is seen from here. By their exact names: a network disk may serve an
    older list of names."""
    return [[rank for rank in ranks if _is_mark(Path(use["folder"]) / f"{MARK}{token}-{rank}", token)] for use in found]


def remove_marks(found: list[dict[str, Any]], token: str, rank: int) -> None:
    for use in found:
        with suppress(OSError):
            (Path(use["folder"]) / f"{MARK}{token}-{rank}").unlink()


def new_token() -> str:
    return secrets.token_hex(8)


def try_renames(folder: Path) -> str | None:
    """In words what is wrong with renames there; None where none of `REPLACES` replacements showed a reader of this node a file
    that was absent or a mixture, and a folder took the place of an empty one."""
    target, over = folder / "target", threading.Event()
    wrong: list[str] = []
    reads: deque[str] = deque(maxlen=READS)
    texts = {"a" * 4096, "b" * 4096}
    target.write_text("a" * 4096)

    def read() -> None:
        while not over.is_set() and not wrong:
            try:
                reads.append(target.read_text())
                if reads[-1] not in texts:
                    wrong.append("a reader saw a mixture of two files")
            except OSError as error:
                wrong.append(f"a reader found no file ({error.strerror})")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for turn in range(10 * REPLACES):
        if wrong or (turn >= REPLACES and len(reads) >= READS):
            break
        fresh = folder / "fresh"
        fresh.write_text("ab"[turn % 2] * 4096)
        os.replace(fresh, target)
    over.set()
    reader.join(10)
    for name in ("one", "other"):
        (folder / name).mkdir()
    (folder / "one" / "file").write_text("1")
    try:
        os.rename(folder / "one", folder / "other")
    except OSError as error:
        wrong.append(f"a folder cannot take the place of an empty one ({error.strerror})")
    return wrong[0] if wrong else None


def _try_sync(folder: Path) -> dict[str, Any]:
    """Seconds that 64 KiB and the name of their file took to the disk (a median), and the system's refusal where there is one."""
    seconds = []
    try:
        for turn in range(SYNCS):
            with (folder / f"synced{turn}").open("wb") as file:
                file.write(os.urandom(1 << 16))
                file.flush()
                began = time.perf_counter()
                os.fsync(file.fileno())
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            seconds.append(time.perf_counter() - began)
    except OSError as error:
        return {"refused": error.strerror or str(error), "seconds": None}
    preloaded = "eatmydata" in os.environ.get("LD_PRELOAD", "")
    return {"refused": None, "seconds": statistics.median(seconds), "swallowed": preloaded}


def _is_mark(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _same(path: Path) -> str | None:
    """Equal on two nodes that see one file: its number, and the moment in which it became what it is. None where it is absent."""
    file = path / "config.json" if path.is_dir() else path
    try:
        found = file.stat()
    except OSError:
        return None
    return f"{found.st_ino}-{found.st_ctime_ns}"


def _content(file: Path) -> str:
    """What tells one content from another by a few reads: its size, and a hash of its begin and its end."""
    import hashlib

    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read(1 << 20))
    return f"{size} bytes, {digest.hexdigest()[:12]}"
