"""Whether the nodes reach each other by the network card that is used: plain TCP, both ways, at ports over the whole range from
which the system gives them to connections, with a time limit, before anything that would wait for long is tried.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_subspace.doctor.findings import PACKAGES, UNREACHED, Finding
from dist_subspace.doctor.ranks import Ranks, picked

KIND = "network"
PORTS = 8  # that are tried of each node
TIMEOUT = 5.0  # seconds for a connection, and for what goes through it
PAYLOAD = 1 << 18  # bytes: more than one packet, so that packets that are too large for the way show
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a card


def examine() -> dict[str, Any]:
    """The cards of this node with their addresses, and the one by which torch's gloo offers this process to the others."""
    cards = addresses()
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    found: dict[str, Any] = {"cards": cards, "asked": asked or None, "nccl": os.environ.get("NCCL_SOCKET_IFNAME")}
    if asked:
        found |= {"address": cards.get(asked), "how": "GLOO_SOCKET_IFNAME"}
    else:
        try:
            found |= {"address": socket.gethostbyname(socket.gethostname()), "how": "the host's name"}
        except OSError:  # gloo takes the loopback then
            found |= {"address": "127.0.0.1", "how": "the host's name is no address"}
    found["card"] = next((name for name, address in cards.items() if address == found["address"]), None)
    return found


def addresses() -> dict[str, str]:
    """The IPv4 address of each network card that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                asked = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)[20:24])
    return found


class Listener:
    """Sockets at ports spread over the system's range, which answer whoever sends `PAYLOAD` bytes."""

    def __init__(self, address: str) -> None:
        self._sockets = [self._bound(address, port) for port in spread(port_range(), PORTS)]
        self.ports: list[int] = [listening.getsockname()[1] for listening in self._sockets]
        for listening in self._sockets:
            threading.Thread(target=self._serve, args=(listening,), daemon=True).start()

    def close(self) -> None:
        for listening in self._sockets:
            listening.close()

    @staticmethod
    def _bound(address: str, port: int) -> socket.socket:
        """At the port, one of the next ones, or any."""
        for wanted in (*range(port, port + 20), 0):
            listening = socket.socket()
            try:
                listening.bind((address, wanted))
            except OSError:
                listening.close()
                if wanted == 0:
                    raise
                continue
            listening.listen(128)
            return listening
        raise OSError("no port")

    @staticmethod
    def _serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        connection.settimeout(TIMEOUT)
        left = PAYLOAD
        while left > 0 and (piece := connection.recv(1 << 16)):
            left -= len(piece)
        connection.sendall(b"k")


def reach(nodes: dict[int, tuple[str, list[int]]]) -> dict[str, Any]:
    """Try the ports of other nodes. Arguments: address and ports of each node, by its first rank.

    Returns:
        By rank, in words, for each port, why it is not reached (None where it is); and the seconds of the quickest connection.
    """
    tried = [(rank, address, port) for rank, (address, ports) in nodes.items() for port in ports]
    found: dict[str, Any] = {str(rank): {"ports": {}, "seconds": None} for rank in nodes}
    with ThreadPoolExecutor(max_workers=64) as pool:
        for (rank, _, port), (why, seconds) in zip(tried, pool.map(lambda one: _try(*one[1:]), tried), strict=True):
            link = found[str(rank)]
            link["ports"][str(port)] = why
            if seconds is not None and (link["seconds"] is None or seconds < link["seconds"]):
                link["seconds"] = seconds
    return found


def _try(address: str, port: int) -> tuple[str | None, float | None]:
    began = time.perf_counter()
    try:
        connection = socket.create_connection((address, port), timeout=TIMEOUT)
    except OSError as error:
        return error.strerror or str(error), None
    seconds = time.perf_counter() - began
    with connection:
        try:
            connection.sendall(b"x" * PAYLOAD)
            return (None, seconds) if connection.recv(1) == b"k" else ("closed without an answer", None)
        except OSError:
            return "connects, but large packets do not come through (the card's MTU?)", None


def port_range() -> tuple[int, int]:
    """From which the system takes ports for connections."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999


def spread(limits: tuple[int, int], count: int) -> list[int]:
    low, high = limits
    return [low + (high - low) * (2 * number + 1) // (2 * count) for number in range(count)]


def reached(links: dict[str, Any], rank: int) -> bool:
    return all(why is None for why in links.get(str(rank), {"ports": {}})["ports"].values())


def rows(ranks: Ranks) -> Iterator[tuple[str, dict[int, Any]]]:
    yield "card", picked(ranks.of(KIND), _card_text)


def judge(ranks: Ranks) -> Iterator[Finding]:
    several = len(ranks.hosts) > 1
    for rank, facts in ranks.of(KIND).items():
        if facts["address"] is None:
            what = f"GLOO_SOCKET_IFNAME is {facts['asked']}, and the node has {', '.join(sorted(facts['cards']))}"
            do = "name the card between the nodes (INTERFACE of launch/carried.sh; ip -br address lists them)"
            yield Finding(KIND, "card", (rank,), what, do, UNREACHED - 5)
        elif several and facts["address"].startswith("127."):
            what = f"gloo offers this node to the others at {facts['address']} ({facts['how']}), where they do not reach it"
            do = "set GLOO_SOCKET_IFNAME to the card between the nodes (INTERFACE of launch/carried.sh), or mend /etc/hosts"
            yield Finding(KIND, "card", (rank,), what, do, UNREACHED - 5)
    asked = {facts["nccl"] for facts in ranks.of(KIND).values()}
    if len(asked) > 1:
        what = f"NCCL_SOCKET_IFNAME is not alike: {', '.join(sorted(str(name) for name in asked))}"
        yield Finding(
            KIND, "card", tuple(ranks.facts), what, "carry it to every node (launch/carried.sh)", PACKAGES, False
        )
    for rank, links in ranks.of("links").items():
        for other, link in links.items():
            yield from _of_link(ranks, rank, int(other), link["ports"])


def _of_link(ranks: Ranks, rank: int, other: int, ports: dict[str, str | None]) -> Iterator[Finding]:
    closed = {port: why for port, why in ports.items() if why is not None}
    if closed:
        first, why = next(iter(closed.items()))
        more = f" and {len(closed) - 1} more of the {len(ports)} that were tried" if len(closed) > 1 else ""
        what = f"{ranks.host(rank)} does not reach {ranks.host(other)} at port {first}{more} ({why})"
        low, high = port_range()
        do = (
            f"let the firewall pass TCP between the nodes at ports {low} to {high}, where gloo and NCCL meet, or name another "
            "card (INTERFACE of launch/carried.sh)"
        )
        yield Finding(KIND, "card", (rank,), what, do, UNREACHED)


def _card_text(facts: dict[str, Any]) -> str:
    text = f"{facts['card'] or facts['asked'] or 'no card'}, {facts['address'] or 'no address'}, by {facts['how']}"
    return text + (f"; NCCL: {facts['nccl']}" if facts["nccl"] else "")
