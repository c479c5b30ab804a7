"""RUN/environment.json: with what a run was made. Versions, commit, hardware, launcher, command line; of every start of it.

No secret is in it: of the environment's variables those are kept that decide how libraries compute and talk.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_subspace.atomic_files import write_json_atomic
from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.versions import commit, package_digest
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.training.whereabouts import started_by

PACKAGES = (
    *("torch", "transformers", "deepspeed", "bitsandbytes", "accelerate", "peft", "trl", "tokenizers", "sentencepiece"),
    *("safetensors", "huggingface_hub", "datasets", "numpy", "pydantic", "triton"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_BEGINNINGS = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUBLAS_", "DIST_SUBSPACE_")
_STARTS = 50  # that are kept, the newest


def gather_environment(step: int) -> dict[str, Any]:
    """Collective: the facts of this start, which begins after `step` finished steps."""
    places = gather_objects((socket.gethostname(), _device(), _cpu()))
    hosts = Counter(host for host, _, _ in places)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "working_folder": os.getcwd(),
        "launcher": started_by(os.environ),
        "ranks": world().size,
        "hosts": dict(hosts),
        "devices": dict(Counter(device for _, device, _ in places)),
        "cpus": {host: cpu for host, _, cpu in places},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "dist_subspace": {"version": _version("dist_subspace"), "commit": None, "files": package_digest()},
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(_BEGINNINGS)},
    }


def write_environment(run: RunFolder, facts: dict[str, Any]) -> None:
    """Local, rank 0: the facts of this start, and those of the starts before it.

    Raises:
        StorageError: the disk refuses.
    """
    facts["dist_subspace"]["commit"] = commit()
    write_json_atomic(run.environment, {**facts, "earlier": [*_earlier(run.environment)][:_STARTS]})


def _earlier(file: Path) -> list[dict[str, Any]]:
    """The starts before, the newest first."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        older = before.pop("earlier", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [before, *older]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _cpu() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else name
