"""Which hosts answer: real addresses of this machine, and one at which nobody does."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from dist_subspace.placement.reach import answering, answers
from tests.ranks import free_port


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address and a port where connections are neither taken nor refused: the queue is full."""
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.socket())
        server.bind(("127.0.0.2", free_port()))
        server.listen(0)
        for _ in range(3):
            client = open_sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()


def test_a_host_answers_whether_something_listens_there_or_not(silent: tuple[str, int]) -> None:
    assert answers("127.0.0.1", free_port(), 2.0), "it refuses the connection"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert answers("127.0.0.1", server.getsockname()[1], 2.0)
    assert not answers(*silent, 0.5)
    assert not answers("no-such-host.invalid", 9, 0.5)


def test_all_are_asked_at_the_same_time(silent: tuple[str, int]) -> None:
    address, port = silent
    began = time.monotonic()
    found = answering([address, "127.0.0.1", "no-such-host.invalid"], 0.5, {"MASTER_PORT": str(port)})
    assert found == {"127.0.0.1"} and time.monotonic() - began < 5.0
