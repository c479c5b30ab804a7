"""The beginning and the end of the process group, whoever trains."""

from __future__ import annotations

import threading

import torch

from dist_subspace.launchers import enter
from dist_subspace.placement.collectives import is_distributed
from dist_subspace.placement.deepspeed.available import deepspeed_is_missing
from dist_subspace.placement.deepspeed.process_group import ensure_process_group
from dist_subspace.placement.rendezvous import met
from dist_subspace.placement.versions import facts

_PATIENCE = 600.0  # seconds for the ranks to meet without DeepSpeed; its own patience with it


def meet_ranks() -> None:
    """Collective: make the process group if a launcher has started this process and there is none. A process that is alone has
    nobody to meet; DeepSpeed's engine makes a group for one where it is used."""
    place = enter()
    if is_distributed() or place.is_alone:
        return
    if deepspeed_is_missing() is None:
        ensure_process_group()
    elif place.address is not None:  # so that what is refused next is refused by all, and said once
        with met(place, _PATIENCE, facts()):
            torch.distributed.init_process_group("gloo")


def leave_process_group() -> None:
    """Collective where ranks are well: end the process group before the interpreter ends, or gloo's threads may abort it. Where
    they are not, it is given a few seconds."""
    if is_distributed():
        ending = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
        ending.start()
        ending.join(5.0)
