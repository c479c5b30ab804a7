"""Nodes try each other's ports with a time limit; a port that is closed is named with both hosts."""

from __future__ import annotations

import socket
import time

import pytest

from dist_subspace.doctor import network
from dist_subspace.doctor.network import Listener, addresses, examine, judge, reach, reached, spread
from tests.doctor.facts import ranks_of, sentences
from tests.ranks import free_port

CARD = {"cards": {"eth0": "10.0.0.1"}, "asked": None, "nccl": None, "address": "10.0.0.1", "how": "the host's name"}


def test_ports_that_are_open_are_reached_and_one_that_is_closed_is_not() -> None:
    listener, closed = Listener("127.0.0.1"), free_port()
    try:
        found = reach({4: ("127.0.0.1", [*listener.ports, closed])})["4"]
    finally:
        listener.close()
    assert [port for port, why in found["ports"].items() if why is not None] == [str(closed)]
    assert found["ports"][str(closed)] == "Connection refused" and 0 < found["seconds"] < 5
    assert len(listener.ports) == network.PORTS and not reached({"4": found}, 4)


def test_a_port_that_keeps_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that drops, or behind one that lets small packets pass alone."""
    monkeypatch.setattr(network, "TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        port = silent.getsockname()[1]
        found = reach({1: ("127.0.0.1", [port])})["1"]["ports"][str(port)]
    assert found is not None and "large packets do not come through" in found and time.monotonic() - began < 10


def test_the_ports_that_are_tried_are_spread_over_the_systems_range() -> None:
    assert spread((1000, 2000), 4) == [1125, 1375, 1625, 1875]


def test_a_link_that_is_closed_is_named_from_the_side_that_does_not_come_through() -> None:
    good, bad = {"ports": {"40000": None}}, {"ports": {"40000": "timed out", "41000": "timed out", "42000": None}}
    links = [{"1": good, "2": good}, {"0": good, "2": good}, {"0": bad, "1": good}]
    ranks = ranks_of("network", [CARD] * 3, links=links)
    assert sentences(ranks, judge(ranks), breaks=True) == [
        "node3 (rank 2): node3 does not reach node1 at port 40000 and 1 more of the 3 that were tried (timed out)"
    ]


def test_an_address_that_others_do_not_reach_and_a_card_that_is_not_there_are_named() -> None:
    loop = CARD | {"address": "127.0.1.1"}
    ranks = ranks_of("network", [CARD, loop])
    assert "gloo offers this node to the others at 127.0.1.1" in sentences(ranks, judge(ranks))[0]
    one_node = ranks_of("network", [loop, loop], ["node1", "node1"])
    assert sentences(one_node, judge(one_node)) == []
    missing = ranks_of("network", [CARD, CARD | {"asked": "eth9", "address": None}])
    assert sentences(missing, judge(missing)) == ["node2 (rank 1): GLOO_SOCKET_IFNAME is eth9, and the node has eth0"]


def test_this_machines_cards_have_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses()["lo"] == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert (examine()["address"], examine()["card"]) == ("127.0.0.1", "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    assert examine()["address"] is None
