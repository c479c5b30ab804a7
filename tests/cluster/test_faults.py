"""What happens to a run when a host, a link or a program fails: who is left names who was lost and leaves in time, the
launcher returns, and the same command goes on from the checkpoint. What only slows a link down changes no bit."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import DISK, Host, Hosts
from tests.cluster.launching import hostfile, path_without_pdsh, script
from tests.cluster.training import ENVIRONMENT, RUN_TIMEOUT, Recipe, result

pytestmark = pytest.mark.cluster
TIMEOUT = 30.0  # seconds, of training.rank_timeout
STEPS = 6
# Long steps of many micro-batches, and a checkpoint after each.
LONG = (
    f"training.max_steps={STEPS}",
    "training.global_batch_size=60",
    "data.packing=false",
    "checkpoint.save_steps=1",
    f"training.rank_timeout={TIMEOUT:.0f}",
)


@pytest.fixture(autouse=True)
def mended(hosts: Hosts) -> Iterator[None]:
    """Whatever a test has done to the cables is undone, and nothing of its run stays."""
    yield
    for host in hosts:
        host.mend()
        host.run(["pkill", "-KILL", "-f", "[l]aunch/train.py"], timeout=10)
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"], timeout=10)
        host.run(["nft", "flush", "ruleset"], timeout=10)


@dataclass
class Fault:
    """A run that was started, hurt in the middle of its third step, and is over: what was said, and how many seconds after the
    fault it was said why (in status.json), and the command had returned."""

    said: str
    status: dict[str, Any]
    told: float
    seconds: float
    returncode: int


def hurt(process: subprocess.Popen[str], run: Path, fault: Callable[[], object], limit: float) -> Fault:
    """Let the fault happen in the middle of the third step, and wait for the end of the command."""
    deadline = time.monotonic() + RUN_TIMEOUT
    while not (run / "checkpoint-2").exists():
        assert time.monotonic() < deadline and process.poll() is None, "".join(process.communicate())[-4000:]
        time.sleep(0.05)
    time.sleep(0.5)
    fault()
    began, wall = time.monotonic(), time.time()
    out, err = process.communicate(timeout=limit)
    seconds, file = time.monotonic() - began, run / "status.json"
    said, told = (out + err).replace("\r\n", "\n"), file.stat().st_mtime - wall
    return Fault(said, json.loads(file.read_text()), told, seconds, process.returncode)


def on_deepspeed(hosts: Hosts, first: str, names: tuple[str, ...], folder: Path, **more: str) -> Callable[..., Any]:
    """`launch/deepspeed.sh` on these hosts, started on one of them."""
    file = hostfile(folder, **dict.fromkeys(names, 1))
    environment = ENVIRONMENT | {"HOSTFILE": file, "HOST_TIMEOUT": "24"} | more

    def start(recipe: Recipe, *changes: str) -> subprocess.Popen[str]:
        command = [script("deepspeed.sh"), *recipe.arguments(folder / "run", *LONG, *changes)]
        return hosts[first].start(command, environment, timeout=RUN_TIMEOUT)

    return start


def assert_left_alone(hosts: Hosts, seconds: float = 20.0) -> None:
    """No rank lives on any host any more, nor what started it there; so many seconds later at most."""
    deadline = time.monotonic() + seconds
    for host in hosts:
        while (found := host.run(["pgrep", "-af", "[l]aunch/train.py"], timeout=10)).returncode != 1:
            assert time.monotonic() < deadline, f"{host.name}: {found.stdout}"
            time.sleep(0.5)


def own_log(host: Host, rank: int) -> str:
    return host.run(["bash", "-c", f"cat {DISK}/dist_subspace-root/run-*/logs/rank-{rank}.log"], timeout=10).stdout


@pytest.mark.parametrize("way", ["pdsh", "ssh"])
def test_a_host_that_is_cut_off_is_named_and_two_hosts_go_on(
    way: str, hosts: Hosts, recipe: Recipe, tmp_path: Path
) -> None:
    more = {"PATH": path_without_pdsh(tmp_path)} if way == "ssh" else {}
    start = on_deepspeed(hosts, "node1", ("node1", "node2", "node3"), tmp_path, **more)
    fault = hurt(start(recipe), tmp_path / "run", hosts["node3"].cut, TIMEOUT + 60)
    assert fault.returncode != 0 and fault.told < TIMEOUT and fault.seconds < TIMEOUT + 30, fault
    status = fault.status
    assert (status["state"], status["rank"], status["rank_host"], status["step"]) == ("failed", 2, "node3", 2), (
        fault.said
    )
    assert "rank 2 (process " in status["message"] and "node3 does not answer" in status["message"]
    assert fault.said.count(f"error: {status['message']}") == 1 and "Traceback" not in fault.said, fault.said
    assert_left_alone(hosts)
    assert "no other host answers: node3 was cut off" in own_log(hosts["node3"], 2)
    start = on_deepspeed(hosts, "node1", ("node1", "node2"), tmp_path, **more)
    out, err = start(recipe).communicate(timeout=RUN_TIMEOUT)
    found = result(tmp_path / "run")
    assert found.state == "finished" and "continuing after step 2" in out, out + err
    assert found.losses == pytest.approx(recipe.alone(3, *LONG).losses, rel=1e-3)


def test_the_host_of_rank_0_is_cut_off_and_the_others_name_it(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    """Its store goes with it. The command was started elsewhere, and returns too."""
    start = on_deepspeed(hosts, "node3", ("node1", "node2", "node3"), tmp_path)
    fault = hurt(start(recipe), tmp_path / "run", hosts["node1"].cut, TIMEOUT + 60)
    assert fault.returncode != 0 and fault.told < TIMEOUT and fault.seconds < TIMEOUT + 30, fault
    status = fault.status
    assert (status["state"], status["rank"], status["rank_host"]) == ("failed", 0, "node1"), fault
    assert "error: rank 0 (process " in fault.said and "node1 does not answer" in fault.said, fault.said
    assert_left_alone(hosts)


def test_the_host_of_the_command_and_of_rank_0_is_cut_off_and_says_so(
    hosts: Hosts, recipe: Recipe, tmp_path: Path
) -> None:
    start = on_deepspeed(hosts, "node1", ("node1", "node2", "node3"), tmp_path)
    fault = hurt(start(recipe), tmp_path / "run", hosts["node1"].cut, TIMEOUT + 60)
    assert fault.returncode != 0 and fault.told < TIMEOUT and fault.seconds < TIMEOUT + 30, fault
    assert (fault.status["state"], fault.status["rank"], fault.status["rank_host"]) == ("failed", 0, "node1"), fault
    assert_left_alone(hosts)


def test_a_link_that_returns_after_a_few_seconds_does_no_harm(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    def blink() -> None:
        hosts["node2"].cut()
        time.sleep(8)
        hosts["node2"].mend()

    start = on_deepspeed(hosts, "node1", ("node1", "node2"), tmp_path)
    fault = hurt(start(recipe), tmp_path / "run", blink, RUN_TIMEOUT)
    assert fault.returncode == 0, fault.said
    assert result(tmp_path / "run") == recipe.alone(2, *LONG)


def test_torchrun_goes_on_by_itself_with_the_nodes_that_are_left(hosts: Hosts, recipe: Recipe, tmp_path: Path) -> None:
    """Two nodes of three are enough: their agents start the ranks again."""
    environment = ENVIRONMENT | {"NODES": "2:3", "FIRST": "node1:29400", "RESTARTS": "1"}
    command = [script("torchrun.sh"), *recipe.arguments(tmp_path / "run", *LONG)]
    others = {name: hosts[name].start(command, environment, timeout=2 * RUN_TIMEOUT) for name in ("node2", "node3")}
    first = hosts["node1"].start(command, environment, timeout=2 * RUN_TIMEOUT)
    fault = hurt(first, tmp_path / "run", hosts["node3"].cut, RUN_TIMEOUT)
    second = "".join(others["node2"].communicate(timeout=RUN_TIMEOUT))
    others["node3"].terminate()  # its agent waits for the meeting long after its rank has left
    third = "".join(others["node3"].communicate(timeout=60))
    assert (fault.returncode, others["node2"].returncode) == (0, 0), fault.said + second
    assert "no other host answers: node3 was cut off" in third, third
    assert "on node3) has given no sign of life" in fault.said + second
    found = result(tmp_path / "run")
    assert found.state == "finished" and len(found.losses) == STEPS
    assert found.losses == pytest.approx(recipe.alone(3, *LONG).losses, rel=1e-3)
    assert_left_alone(hosts)


def lose_packets(hosts: Hosts) -> None:
    """Of each host, three of a hundred."""
    rules = "table ip lossy { chain in { type filter hook input priority 0; numgen random mod 100 < 3 drop; }; }"
    for host in hosts:
        host.run(["nft", rules], timeout=10).check_returncode()


def slow_links(hosts: Hosts) -> None:
    for name in hosts.names:
        hosts.slow_down(name, "20mbit")


@pytest.mark.parametrize("hurt_links", [lose_packets, slow_links])
def test_links_that_lose_packets_or_are_slow_change_no_bit(
    hurt_links: Callable[[Hosts], None], hosts: Hosts, recipe: Recipe, tmp_path: Path
) -> None:
    """There is no delay among them: this kernel has no netem, and the ranks find each other by address, past any relay."""
    if hurt_links is lose_packets and hosts["node1"].run(["which", "nft"], timeout=10).returncode:
        pytest.skip("needs nft: apt-get install --no-install-recommends nftables")
    hurt_links(hosts)
    command = [script("deepspeed.sh"), *recipe.arguments(tmp_path / "run", "training.rank_timeout=60")]
    environment = ENVIRONMENT | {"HOSTFILE": hostfile(tmp_path, node1=1, node2=1)}
    done = hosts["node1"].run(command, RUN_TIMEOUT, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path / "run") == recipe.alone(2)
