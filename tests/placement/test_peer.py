"""A rank's process as the others know it: real processes that live, stop and end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from dist_subspace.placement.peer import Peer, own_address


def peer_of(process: subprocess.Popen[bytes]) -> Peer:
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(Peer.of_this_process(3), pid=process.pid, started=started)


def test_a_process_is_seen_to_live_to_be_stopped_and_to_end() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        peer = peer_of(process)
        assert str(peer) == f"rank 3 (process {process.pid} on {os.uname().nodename})"
        assert peer.is_here and peer.has_ended() is False and not peer.is_stopped()
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while not peer.is_stopped():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert peer.has_ended() is False
        assert replace(peer, started="1").has_ended() is True, "another process has its number by now"
    finally:
        process.kill()
        process.wait()
    assert peer.has_ended() is True and not peer.is_stopped()


def test_of_another_machine_nothing_is_known() -> None:
    peer = replace(Peer.of_this_process(0), machine="elsewhere")
    assert peer.has_ended() is None and not peer.is_here and not peer.is_stopped()


def test_the_others_reach_rank_0_where_they_meet_it_and_another_rank_by_the_address_that_it_meets_rank_0_from() -> None:
    assert own_address(0, {"MASTER_ADDR": "node1"}) == "node1"
    assert own_address(1, {"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert own_address(1, {"MASTER_ADDR": "no-such-host.invalid"}) == "no-such-host.invalid"
    assert own_address(1, {}) == os.uname().nodename
