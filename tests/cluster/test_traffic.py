"""Bytes that really cross the cable between two hosts of two ranks, against the formula, and what a slow cable makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.cluster.hosts import Hosts
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.cluster
RATES = {"1gbit": 1e9, "100mbit": 1e8}  # as tc and as a number have them
HEADERS = 1.06  # TCP and Ethernet around the data, and the answers to the other host's


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    """39 million weights in six blocks: 22 MB in 4 bits."""
    torch.manual_seed(0)
    widths = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False}
    folder = shared / "link-model"
    LlamaForCausalLM(tiny_config("LlamaConfig", **widths, **heads)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def over_the_cable(hosts: Hosts, model: Path, preset: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What node1 and node2 have sent in a step, by rate."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", f"--rdzv-id={preset}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29407", "-m", "tests.cluster.link"]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "eth0"}
    command = [*launch, str(model), preset, str(folder), *RATES]
    started = [hosts[name].start(command, environment, timeout=RUN_TIMEOUT) for name in ("node1", "node2")]
    found = {}
    try:
        for rate in RATES:
            for name in ("node1", "node2"):
                hosts.slow_down(name, rate)
            (folder / f"{rate}.go").touch()
            files = [folder / f"{rate}-{name}.json" for name in ("node1", "node2")]
            while not all(file.exists() for file in files):
                time.sleep(0.1)
                assert all(process.poll() in (None, 0) for process in started), _said(started)
            found[rate] = [json.loads(file.read_text()) for file in files]
    finally:
        for name in ("node1", "node2"):
            hosts.full_speed(name)
        for process in started:
            process.terminate() if len(found) < len(RATES) else None
    assert [process.wait(60) for process in started] == [0, 0], _said(started)
    return found


def _by_gloo(node: dict[str, Any]) -> int:
    """The formula's bytes, and the gradients' once more: gloo sums on all ranks where a part of the sums is asked for."""
    formula = node["formula"]
    return int(formula["by_node"] + formula["gradients"]["by_node"])


def _said(processes: list[subprocess.Popen[str]]) -> str:
    for process in processes:
        process.terminate()
    return "".join("".join(process.communicate()) for process in processes)


def test_what_crosses_the_cable_is_what_the_formula_says(
    hosts: Hosts, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for preset in ("zero3", "zero3-hpz"):
        for rate, nodes in over_the_cable(hosts, model, preset, tmp_path / preset).items():
            for node in nodes:
                assert _by_gloo(node) <= node["sent"] <= HEADERS * _by_gloo(node) + 20_000, (preset, rate, node)
            sent, seconds = max(node["sent"] for node in nodes), max(node["seconds"] for node in nodes)
            link = 8 * _by_gloo(nodes[0]) / RATES[rate]
            rows.append((preset, rate, _by_gloo(nodes[0]), int(sent), seconds, link))
    with capsys.disabled():
        print(f"\n{'preset':<11}{'link':>9}{'by formula':>13}{'measured':>13}{'step s':>9}{'of it at least':>16}")
        for preset, rate, formula, sent, seconds, link in rows:
            print(f"{preset:<11}{rate:>9}{formula:>13,}{sent:>13,}{seconds:>9.2f}{link:>14.2f} s")
    by_preset = {row[0]: row[3] for row in rows}
    assert by_preset["zero3-hpz"] < by_preset["zero3"] / 10, "the packed bytes stay inside the hosts"
