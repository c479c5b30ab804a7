"""Which hosts answer at all. Local; a refused connection is an answer, and no program need listen there."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Mapping

_MOST = 16  # hosts that are asked: one that answers tells enough


def answers(address: str, port: int, seconds: float) -> bool:
    """Whether the host at this address answers within so many seconds."""
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except ConnectionError:  # refused, or closed at once
        return True
    except OSError:  # no route, no such name, or silence
        return False
    return True


def answering(addresses: Iterable[str], seconds: float, variables: Mapping[str, str] = os.environ) -> set[str]:
    """Those of the addresses whose host answers within so many seconds; all are asked at the same time."""
    port, found = int(variables.get("MASTER_PORT", 9)), set[str]()

    def ask(address: str) -> None:
        if answers(address, port, seconds):
            found.add(address)

    asking = [threading.Thread(target=ask, args=(address,), daemon=True) for address in sorted(set(addresses))[:_MOST]]
    for thread in asking:
        thread.start()
    for thread in asking:  # a name that is looked up may take longer than the connection
        thread.join(seconds + 0.5)
    return set(found)
