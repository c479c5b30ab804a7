"""The scripts that a person copies, and what they are given."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ranks import ROOT


def script(name: str) -> str:
    return str(ROOT / "launch" / name)


def hostfile(folder: Path, **slots: int) -> str:
    """A hostfile with so many ranks on each host, and a remark."""
    file = folder / "hostfile"
    file.write_text("# tried here\n" + "".join(f"{name} slots={count}\n" for name, count in slots.items()))
    return str(file)


def path_without_pdsh(folder: Path) -> str:
    """The programs of /usr/bin but for one."""
    programs = folder / "programs"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name != "pdsh":
            (programs / program.name).symlink_to(program)
    return f"{Path(sys.executable).parent}:{programs}"
