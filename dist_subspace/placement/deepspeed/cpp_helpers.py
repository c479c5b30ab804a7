"""DeepSpeed's C++ helpers, which it compiles when they are first asked for: the one of CPUs is done without, the ones of NVMe are
checked before anything is loaded. Read against deepspeed 0.19.8.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_subspace.errors import UsageError

_SHARED_MEMORY = "deepspeed_shm_comm"
_NVME = ("async_io", "pin_memory")
_PATIENCE = 600.0  # seconds after which a lock is no build's any more


def without_cpu_helper() -> None:
    """Keep DeepSpeed from building its shared-memory collectives when it makes a process group on CPUs; gloo serves.

    `torch.utils.cpp_extension` would need a C++ compiler and a minute of silence, and a process that is killed meanwhile leaves a
    lock at which every later one waits for ever. DeepSpeed builds what `deepspeed.ops.__compatible_ops__` says can be built;
    it is made on first use, so that edits to it last. Where DeepSpeed is not imported yet, it is edited as soon as it is.
    """
    module = sys.modules.get("deepspeed")
    if module is not None and hasattr(module, "init_distributed"):
        _edit(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _edit(deepspeed: ModuleType) -> None:
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        with redirect_stdout(StringIO()):  # what else cannot be built here is no news
            deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False


class _AfterImport(MetaPathFinder):
    """Lets the import of DeepSpeed end with `_edit`, whoever imports it: a script may make its Trainer's arguments first."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "deepspeed" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_edit(module: ModuleType) -> None:
                execute(module)
                _edit(module)

            spec.loader.exec_module = then_edit  # type: ignore[method-assign]
        return spec


def check_nvme_helpers(config: Mapping[str, Any]) -> None:
    """Local: offloading to NVMe needs helpers that are there, or can be compiled here.

    Raises:
        UsageError: what is missing, or a lock that an interrupted build left, at which DeepSpeed would wait for ever.
    """
    section = config.get("zero_optimization") or {}
    targets = {key: section.get(key) for key in ("offload_param", "offload_optimizer")}
    wanted = [key for key, target in targets.items() if isinstance(target, Mapping) and target.get("device") == "nvme"]
    if not wanted or _built_at_installation():
        return
    what = f"zero_optimization.{wanted[0]}.device is nvme (deepspeed.preset zero3-nvme, or deepspeed.config), for which DeepSpeed"
    missing = _missing()
    if missing:
        raise UsageError(
            f"{what} compiles a helper, and {', '.join(missing)} is missing here; install it, or offload to the CPU instead"
        )
    for lock in _locks():
        age = time.time() - lock.stat().st_mtime
        if age > _PATIENCE:
            raise UsageError(
                f"{what} waits for the lock {lock}, which an interrupted build left {age / 60:.0f} minutes ago; remove that file"
            )


def _built_at_installation() -> bool:
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(_NVME[0]))


def _missing() -> list[str]:
    from deepspeed.accelerator import get_accelerator

    compiler = os.environ.get("CXX", "c++")
    missing = [f"a C++ compiler ({compiler})"] if shutil.which(compiler) is None else []
    if shutil.which("ninja") is None:
        missing.append("ninja")
    if missing:
        return missing
    # A real file: DeepSpeed compiles something to find out, and keeps it quiet by `sys.stderr.fileno()`; where that fails, it
    # takes the library for missing.
    with tempfile.TemporaryFile("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        usable = get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible()
    return [] if usable else ["libaio with its headers (the package libaio-dev or libaio-devel)"]


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [lock for name in _NVME for lock in [*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")]]
