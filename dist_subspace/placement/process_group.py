"""The beginning and the end of the process group, whoever trains."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch

from dist_subspace.launchers import enter
from dist_subspace.placement.collectives import is_distributed
from dist_subspace.placement.deepspeed.available import deepspeed_is_missing
from dist_subspace.placement.deepspeed.process_group import collective_timeout, ensure_process_group
from dist_subspace.placement.rendezvous import met
from dist_subspace.placement.versions import facts
from dist_subspace.torch_internals import set_collective_timeout

# Whether this process ends with a command of ours. A program that calls commands one after another sets it to False: its group
# stays, because DeepSpeed keeps what it has made of the first one.
ENDS_WITH_COMMAND = True
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


def allow_collectives(rank_timeout: float | None) -> None:
    """Local: a collective waits twice as long as a rank may be silent, and never less than its maker has set.

    The heartbeat ends a run whose ranks are gone, frozen or cut off, and says which: a collective that ran out before would end
    it without a name. Its own timeout remains for a rank that lives and does not come, such as one that reads from a dead disk,
    whose threads still give signs of life. What one rank does for all (tokens, decompositions, a merge of hours) is waited for
    in `meet`, which has no timeout.
    """
    if is_distributed() and rank_timeout is not None and torch.distributed.get_world_size() > 1:
        made = _PATIENCE if deepspeed_is_missing() is not None else collective_timeout()
        set_collective_timeout(timedelta(seconds=max(made, 2 * rank_timeout)))


def leave_process_group() -> None:
    """Collective where ranks are well: end the process group before the interpreter ends, or gloo's threads may abort it. Where
    they are not, it is given a few seconds."""
    if is_distributed() and ENDS_WITH_COMMAND:
        ending = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
        ending.start()
        ending.join(5.0)
