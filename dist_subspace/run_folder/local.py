"""A run's folder on the disk of a node: what other nodes than rank 0's need not see, and what is lost with the node.

tokens/                            tokenised samples of a node that does not see RUN   training/data/store.py
logs/rank-<rank>.log               what a rank has said                                training/rank_logs.py
"""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from dist_subspace.errors import UsageError
from dist_subspace.run_folder.folder import RunFolder, StrPath


class LocalFolder(os.PathLike[str]):
    """One run's folder on this node. Nothing need be there: each property is a path, and none is looked at.

    Arguments:
        private_parent: the folder above is this user's too, in one where everybody may write.
    """

    def __init__(self, path: StrPath, private_parent: bool = False) -> None:
        self.path, self._private_parent = Path(path), private_parent

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def tokens(self) -> Path:
        return RunFolder(self.path).tokens

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def make(self) -> None:
        """Local: make the folder, for this user alone. It holds samples of the data, and its name can be guessed: one that
        somebody else has made, or a link, is not used.

        Raises:
            UsageError: it cannot be made, is another user's, or is no folder.
        """
        try:
            if self._private_parent:
                self._make_private(self.path.parent)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._make_private(self.path)
        except OSError as error:
            raise self._refusal(self.path, f"cannot be made ({error.strerror or error})") from None

    def _make_private(self, folder: Path) -> None:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise self._refusal(folder, "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder")
        if found.st_uid != os.geteuid():
            raise self._refusal(folder, "is another user's")
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)

    def _refusal(self, folder: Path, why: str) -> UsageError:
        return UsageError(
            f"{folder}, which run.local_dir means on {socket.gethostname()}, {why}; accepted: a run.local_dir on a disk of each "
            "node where this user can make a folder"
        )


def local_folder(local_dir: str | None, output_dir: StrPath) -> LocalFolder:
    """The folder of a run on this node: `run.local_dir`, or one of the user's in TMPDIR; within it each run has its own, by the
    name of its output_dir, which is the same text on every node."""
    above = Path(local_dir) if local_dir is not None else Path(tempfile.gettempdir()) / f"dist_subspace-{_user()}"
    whole = os.path.abspath(output_dir)
    name = f"{RunFolder(whole).path.name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return LocalFolder(above / name, private_parent=local_dir is None)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.geteuid())
