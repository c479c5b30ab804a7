"""A run's folder on the disk of a node: what other nodes than rank 0's need not see, and what is lost with the node.

tokens/                            tokenised samples of a node that does not see RUN   training/data/store.py
logs/rank-<rank>.log               what a rank has said                                training/rank_logs.py
"""

from __future__ import annotations

import getpass
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder, StrPath


class LocalFolder(os.PathLike[str]):
    """One run's folder on this node. Nothing need be there: each property is a path, and none is looked at."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def make(self) -> None:
        """Local: make the folder, for this user alone.

        Raises:
            UsageError: it cannot be made, or is another user's.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise UsageError(
                f"run.local_dir is {self.path}, which cannot be made ({error}); accepted: a folder on a disk of each node "
                "that this user can write to"
            ) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise UsageError(f"run.local_dir is {self.path}, which is another user's; accepted: a folder of this user's")


def local_folder(local_dir: str | None, output_dir: StrPath) -> LocalFolder:
    """The folder of a run on this node: `run.local_dir`, or one of the user's in TMPDIR; within it each run has its own, by the
    name of its output_dir, which is the same text on every node."""
    above = Path(local_dir) if local_dir is not None else Path(tempfile.gettempdir()) / f"dist_subspace-{_user()}"
    whole = os.path.abspath(output_dir)
    name = f"{RunFolder(whole).path.name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return LocalFolder(above / name)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.geteuid())
