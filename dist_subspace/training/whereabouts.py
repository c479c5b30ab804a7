"""Where a run is, in two lines at its start: nodes and ranks, launcher, what holds the weights, and which folders."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from dist_subspace.config import Config
from dist_subspace.launchers import BY_HAND, read
from dist_subspace.placement.collectives import gather_objects, world
from dist_subspace.placement.engines import zero_stage
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.local import local_folder


def whereabouts(config: Config) -> list[str]:
    """Collective: one line for one process, two for several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hosts = Counter(gather_objects(socket.gethostname()))
    held = f"weights {config.model.storage}, {_placement(config)}"
    run = RunFolder(config.run.output_dir).path.absolute()
    if world().size == 1:
        return [f"1 process on {socket.gethostname()} ({device}); {held}; run folder {run}"]
    local = local_folder(config.run.local_dir, config.run.output_dir)
    return [f"{ranks_text(hosts)} ({device}), {_means()}", f"{held}; run folder {run}, other ranks' logs {local.logs}"]


def ranks_text(hosts: Counter[str]) -> str:
    """4 ranks on 2 nodes, 2 on each of node1, node2; 3 ranks on 2 nodes, 2 on node1, 1 on node2."""
    size, nodes = sum(hosts.values()), len(hosts)
    text = f"{size} ranks on {nodes} node{'' if nodes == 1 else 's'}"
    shown = list(hosts)[:_SHOWN]
    more = f" and {nodes - _SHOWN} more" if nodes > _SHOWN else ""
    if len(set(hosts.values())) == 1:
        return f"{text}, {hosts[shown[0]]} on {'each of ' if nodes > 1 else ''}{', '.join(shown)}{more}"
    return f"{text}, {', '.join(f'{hosts[host]} on {host}' for host in shown)}{more}"


_SHOWN = 8  # nodes that are named


def started_by(variables: Mapping[str, str]) -> str:
    """The launcher, also where it has been entered (`launchers.enter` writes RANK and WORLD_SIZE for all of them)."""
    place = read(variables)
    return place.within[0] if place.launcher == BY_HAND and place.within else place.launcher


def has_screen_of_its_own(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether each node's output stays there, where a person started torchrun or the ranks; the other launchers bring all of it
    together."""
    return started_by(variables) in ("torchrun", BY_HAND)


def _means() -> str:
    return f"started by {started_by(os.environ)}, over {dist.get_backend()}"


def _placement(config: Config) -> str:
    section = config.deepspeed
    if section.config is not None:
        return f"ZeRO stage {zero_stage(section.config)} by deepspeed.config"
    return f"preset {section.preset}"
