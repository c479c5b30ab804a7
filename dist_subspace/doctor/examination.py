"""One rank examines itself: every kind of examination, none of which stops the others."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_subspace.doctor import configuration, devices, disks, hub, limits, network, storages, versions
from dist_subspace.doctor.ranks import FAILED, Facts
from dist_subspace.launchers import Place

LIMITS = {"versions": 300.0, "storages": 300.0, "configuration": 300.0}  # seconds; they import the libraries
LIMIT = 60.0  # seconds of any other
OTHERS_LATER = 30.0  # seconds more, in which rank 0 must have heard of the end


@dataclass(frozen=True)
class Asked:
    """What the command was asked: the configuration's file or None, with its overrides."""

    config: str | None
    overrides: tuple[str, ...]


def who(place: Place) -> dict[str, Any]:
    """This process, for those who do not see it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": place.rank,
        "size": place.size,
        "local_rank": place.local_rank,
        "launcher": place.launcher,
        "python": sys.executable,
    }


def examine_self(place: Place, asked: Asked, token: str, begin: Callable[[str, float], None]) -> Facts:
    """Local: the facts of this rank. The first of a node's ranks examines what all of them share.

    Arguments:
        token: in the marks that this rank leaves in folders.
        begin: called with the name and the limit in seconds of each examination.
    """
    speaks, found = place.local_rank == 0, {"who": who(place)}

    def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        limit = LIMITS.get(name, LIMIT)
        begin(name, limit)
        found[name] = guarded(function, *arguments, limit=limit)
        return found[name]

    run("limits", limits.examine)
    seen = run("versions", versions.examine)
    if FAILED in seen or "torch" not in seen["broken"]:
        local = int(os.environ.get("LOCAL_RANK", place.local_rank))
        own = run("devices", devices.examine, local)
        device = f"cuda:{local}" if own.get("own", {}).get("type") == "cuda" else "cpu"
        run("storages", storages.examine, device)
    said: dict[str, Any] = {}
    if asked.config is not None:
        said = run("configuration", configuration.examine, asked.config, list(asked.overrides), speaks, place.rank == 0)
    if speaks:
        run("network", network.examine)
        places = [disks.Use(**use) for use in said.get("uses") or []] or configuration.uses(None)
        run("disks", disks.examine, places, token, place.rank)
        run("hub", hub.examine, said.get("hub model"), said.get("hub revision"))
    return found


def guarded(function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """What the function returns; where it raises, or is not back in `limit` seconds, why, under `FAILED`. A call that hangs is
    left behind on its thread."""
    result: list[Any] = []

    def call() -> None:
        try:
            result.append(function(*arguments))
        except BaseException as error:
            first = next(iter(str(error).strip().splitlines()), "")
            result.append({FAILED: f"{type(error).__name__}: {first[:300]}"})

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit)
    return result[0] if result else {FAILED: f"it was not done after {limit:g} seconds"}
