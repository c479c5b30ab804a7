"""One rank of the test harness: joins a gloo process group, then runs the functions that its parent sends.

Forked by `tests.ranks`; reads and answers over the pipe that it is given.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # the parent's own limit is shorter and says more


def leave_with_parent() -> None:
    """End this process when the one that asked for it has gone, whatever it is doing then."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def become_a_rank(folder: str, log: str, environment: dict[str, str]) -> None:
    """What a process started for itself would have: a group, a folder, an environment, and its output in a file."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["rank"]
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(output)


def join_group() -> None:
    """Collective: the process group, made the way that the launched program would make it."""
    import deepspeed
    import torch

    from dist_subspace.placement.deepspeed.cpp_helpers import without_cpu_helper

    without_cpu_helper()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)


def find_function(module: str, qualname: str) -> Callable[..., Any]:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


class CleanState:
    """Process-wide state as it was before the first case, put back after each one.

    DeepSpeed 0.19 keeps more than its engines: the stack of modules in their forward (each ZeRO-3 engine leaves its
    model on it for good), the counter of parameter ids, the patches of `zero.Init` where it was left by an error, its
    own `torch.nn.functional.linear`, and the sub-groups of hpZ, which a second engine asserts not to exist.
    """

    def __init__(self) -> None:
        import torch

        self.environment = dict(os.environ)
        self.directory = os.getcwd()
        self.arguments = list(sys.argv)
        self.linear = torch.nn.functional.linear

    def restore(self) -> None:
        import torch

        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        sys.argv[:] = self.arguments
        torch.nn.functional.linear = self.linear  # type: ignore[assignment]
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
        self._restore_deepspeed()
        gc.collect()
        # What is left is imported code: DeepSpeed collects garbage for every engine, and need not look at it again.
        gc.freeze()
        seed_everything()

    def _restore_deepspeed(self) -> None:
        from deepspeed.runtime.zero import parameter_offload, partition_parameters
        from deepspeed.utils import groups
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # a Trainer that was refused may be alive, and transformers would split every model
        parameter_offload.FWD_MODULE_STACK.clear()
        if partition_parameters.zero_init_context:
            if partition_parameters.top_level_context is not None:
                partition_parameters.top_level_context.unpatch_init_and_builtins()
            partition_parameters.zero_init_context = 0
            partition_parameters.top_level_context = None
        partition_parameters.Init.param_id = 0
        partition_parameters.empty_buffers.clear()
        world_group = groups._WORLD_GROUP  # the same in every case, and a new one costs threads
        groups._release_process_group_references()
        groups._WORLD_GROUP = world_group


def seed_everything() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def run_case(message: bytes) -> bytes:
    """The pickled answer to one pickled case: ("result", value), ("exit", status) or ("error", traceback)."""
    try:
        module, qualname, args = pickle.loads(message)
        return pickle.dumps(("result", find_function(module, qualname)(*args)))
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        return pickle.dumps(("exit", status))
    except BaseException:
        return pickle.dumps(("error", traceback.format_exc()))


def group_is_whole() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() == int(os.environ["WORLD_SIZE"])


def serve(pipe: Connection) -> None:
    join_group()
    clean = CleanState()
    seed_everything()
    pipe.send_bytes(pickle.dumps(("ready", os.getpid())))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        answer = run_case(message)
        sys.stdout.flush()
        sys.stderr.flush()
        clean.restore()
        pipe.send_bytes(pickle.dumps((answer, group_is_whole())))


def main(pipe: Connection, folder: str, log: str, environment: dict[str, str]) -> None:
    become_a_rank(folder, log, environment)
    os.set_inheritable(pipe.fileno(), False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks a rank that hangs where it is
    leave_with_parent()
    try:
        serve(pipe)
    except BaseException:
        pipe.send_bytes(pickle.dumps(("failed to start", traceback.format_exc())))
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # no clean-up at exit: a peer that is gone would make it wait
