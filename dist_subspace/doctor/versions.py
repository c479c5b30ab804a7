"""Versions of Python, the packages, driver and CUDA, and of this package itself: there, importable, and alike everywhere."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_subspace.doctor.findings import ABSENT, PACKAGES, REMARK, Finding
from dist_subspace.doctor.ranks import Ranks, alike, picked
from dist_subspace.placement.versions import ALIKE, commit, package_digest

KIND = "versions"
OWN = "dist_subspace"
# What this package imports, by the name of the distribution and of the module; the least version that it is written for.
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "deepspeed": "deepspeed",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "huggingface_hub": "huggingface_hub",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "sentencepiece": "sentencepiece",
    "typer": "typer",
    "rich": "rich",
}
MUST_BE_ALIKE = ("Python", OWN, *ALIKE, "torch's CUDA", "NCCL")


def examine() -> dict[str, Any]:
    """Versions by name, None for what is not installed; and in words what cannot be imported, by name."""
    found: dict[str, Any] = {"Python": ".".join(platform.python_version_tuple()[:2]), OWN: package_digest()}
    broken: dict[str, str] = {}
    for name, module in NEEDED.items():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
        try:
            if getattr(importlib.import_module(module), "__file__", None) is None:
                broken[name] = "its folder is empty"
        except Exception as error:  # a build for another torch, driver or compiler fails in many ways
            broken[name] = f"{type(error).__name__}: {_first_line(error)}"
    found |= _of_torch() if "torch" not in broken else {}
    return {
        "versions": found,
        "broken": broken,
        "python": sys.executable,
        "commit": commit(),
        "kernel": platform.release(),
    }


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    found = ranks.of(KIND)
    yield "interpreter", picked(found, lambda facts: facts["python"])
    names = dict.fromkeys(name for facts in found.values() for name in facts["versions"])
    shown = {name: {rank: _shown(name, facts) for rank, facts in found.items()} for name in names}
    same = [name for name in NEEDED if name in shown and len(set(shown[name].values())) == 1]
    yield from ((name, texts) for name, texts in shown.items() if name not in same)
    yield "packages", dict.fromkeys(found, ", ".join(f"{name} {next(iter(shown[name].values()))}" for name in same))


def judge(ranks: Ranks) -> Iterator[Finding]:
    found = ranks.of(KIND)
    for name in NEEDED:
        for text, places in alike({rank: _lack(name, facts) for rank, facts in found.items()}):
            if text is not None:
                do = f"install it there ({_python(found, places)} -m pip install {name}), as on the other nodes"
                yield Finding(KIND, name, tuple(places), text, do, ABSENT - 5)
    for name in dict.fromkeys(name for facts in found.values() for name in facts["versions"]):
        yield from _unlike(name, ranks, found)


def _unlike(name: str, ranks: Ranks, found: dict[int, Any]) -> Iterator[Finding]:
    """Where the version is another one than at most ranks."""
    there = {rank: facts["versions"].get(name) for rank, facts in found.items() if name not in facts["broken"]}
    most, *others = alike({rank: version for rank, version in there.items() if version is not None}) or [(None, [])]
    must = name in MUST_BE_ALIKE
    for version, places in others:
        if must and name in ALIKE and str(version).partition("+")[0] == str(most[0]).partition("+")[0]:
            must = False  # builds of one version for CPU and CUDA
        what = f"{name} is {version}, and {most[0]} on {ranks.where(most[1])}"
        if name == OWN:
            what = f"the files of this package are others ({version}) than on {ranks.where(most[1])} ({most[0]})"
        do = "check out the same commit" if name == OWN else "use the same environment"
        yield Finding(KIND, name, tuple(places), what, f"{do} on every node", PACKAGES if must else REMARK, breaks=must)


def _lack(name: str, facts: dict[str, Any]) -> str | None:
    """In words why a package is of no use here; None where it is."""
    if name not in facts["broken"]:
        return None
    if facts["versions"][name] is None:
        return f"{name} is not installed for {facts['python']}"
    return f"{name} {facts['versions'][name]} cannot be imported ({facts['broken'][name]})"


def _shown(name: str, facts: dict[str, Any]) -> str:
    version = facts["versions"].get(name)
    if name == OWN and facts["commit"]:
        return f"{version} (commit {facts['commit']})"
    broken = " (broken)" if name in facts["broken"] and version is not None else ""
    return "absent" if version is None else f"{version}{broken}"


def _of_torch() -> dict[str, str]:
    """What belongs to torch and to the device's driver."""
    import torch

    found = {}
    if torch.version.cuda is not None:
        found["torch's CUDA"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if (driver := driver_version()) is not None:
        found["driver"] = driver
    return found


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"Kernel Module\D*?(\d+(?:\.\d+)+)", text):
            return match[1]
    except OSError:
        pass
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def _python(found: dict[int, Any], places: list[int]) -> str:
    return os.path.normpath(found[places[0]]["python"])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
