"""A process that has imported what the product imports, but nothing of the product: it forks a pytest for each broken tree.

Started as a script, so that no module of this tree is imported. Reads one request a line, JSON: `tree`, `arguments` of pytest,
`seconds`, `output` (a file); answers with pytest's exit status, or null where it did not end in time and was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any

LIBRARIES = (
    *("torch.distributed", "deepspeed", "bitsandbytes", "peft", "datasets", "safetensors.torch", "pytest", "pydantic"),
    *("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    *("typer", "rich", "yaml", "matplotlib", "sentencepiece"),
)
LOOK_EVERY = 0.05  # seconds


def answer(request: dict[str, Any]) -> int | None:
    child = os.fork()
    if child == 0:
        _run(request)
    until = time.monotonic() + request["seconds"]
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(LOOK_EVERY)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(request: dict[str, Any]) -> None:
    """In the child: pytest in the broken tree, as if `python -m pytest` had been started there."""
    os.setsid()
    file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(request["tree"])
    sys.path.insert(0, request["tree"])
    os.environ["PYTHONPATH"] = request["tree"]
    status = 2
    try:
        status = int(sys.modules["pytest"].main(request["arguments"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    sys.dont_write_bytecode = True
    sys.path.pop(0)  # this folder
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
