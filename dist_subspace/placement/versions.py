"""What must be alike on every node, whatever the model. Read from files: nothing is imported for it, torch neither."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ALIKE = ("torch", "deepspeed", "transformers", "bitsandbytes")


def facts() -> dict[str, str]:
    """What must be alike on every node, whatever the model: Python, the packages that compute, and this one's own files."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "dist_subspace": package_digest()}
    for name in ALIKE:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name).partition("+")[0]
    return versions


def package_digest(folder: Path = Path(__file__).parents[1]) -> str:
    """A short hash of the package's source files: equal for equal commits, however they came here."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """Of the checkout that this package lies in, and whether files of the package are changed; None where it lies in none."""
    folder = Path(__file__).parents[1]
    git = ["git", "-c", f"safe.directory={folder.parent}", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "cli.py"], capture_output=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode or tracked.returncode:
        return None
    return head.stdout.strip() + (", changed" if changed.stdout.strip() else "")
