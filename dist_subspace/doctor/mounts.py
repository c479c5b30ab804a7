"""What a folder is mounted from, by /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

NETWORK = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "9p",
    "glusterfs",
    "fuse.glusterfs",
    "pvfs2",
}
MEMORY = {"tmpfs", "ramfs"}  # nothing there outlives the machine
# Options that let a write that was reported to be on disk be lost with the power.
UNSAFE = {"nobarrier", "barrier=0", "volatile"}


@dataclass(frozen=True)
class Mount:
    """kind: of the file system ("ext4"); source: the device or "server:/path"; at: where it is mounted; options: with commas."""

    kind: str
    source: str
    at: str
    options: str

    @property
    def is_network(self) -> bool:
        return self.kind in NETWORK


def mount_of(folder: Path) -> Mount | None:
    """The last mount over the folder; None where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    whole, best = os.path.realpath(folder), None
    for line in lines:
        left, _, right = line.partition(" - ")
        at, fields = _unescaped(left.split()[4]), right.split()
        if whole == at or whole.startswith(at.rstrip("/") + "/"):
            found = Mount(fields[0], _unescaped(fields[1]), at, f"{left.split()[5]},{fields[2] if fields[2:] else ''}")
            best = found if best is None or len(at) >= len(best.at) else best
    return best


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
