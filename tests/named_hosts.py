"""The ranks of one machine as those of several hosts, by name."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def named_host(name: str) -> Iterator[None]:
    """Within the block, this process's host is called so."""
    before = socket.gethostname
    socket.gethostname = lambda: name
    try:
        yield
    finally:
        socket.gethostname = before
