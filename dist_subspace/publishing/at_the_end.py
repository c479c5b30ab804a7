"""`run.push_to_hub`: what can be known before a run of weeks is checked at its start, and what the Hub then does at its end never
fails the run. Local: rank 0 alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from dist_subspace.errors import UsageError
from dist_subspace.publishing.push import push, refuse_another_kind
from dist_subspace.publishing.repository import Repository
from dist_subspace.stopping import STOP, Interrupted


def result_repository(name: str, private: bool | None) -> Repository:
    return Repository(name, "run.push_to_hub", private=private)


def check_before(repository: Repository, notice: Callable[[str], None]) -> None:
    """Raises UsageError where the push at the end cannot succeed: no token, or one of somebody else's, or a repository that holds
    something else, or everybody reads. A Hub that does not answer now may answer then."""
    repository.check()
    try:
        repository.check_owner()
        refuse_another_kind(repository, repository.look(), "adapter")
    except UsageError:
        raise
    except Exception as error:  # whatever the network does
        notice(
            f"run.push_to_hub: the Hub does not say now whether it will take {repository.name} ({type(error).__name__})"
        )


def push_at_the_end(adapter: Path, repository: Repository, say: Callable[[str], None]) -> None:
    """Push the final adapter, or say how it is done again."""
    try:
        with STOP.leavable(), STOP.interruptible():
            made = push(adapter, repository, say)
    except Interrupted as told:
        reason = f"interrupted by {told}"
    except Exception as error:  # the run is whole, whatever happened here
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
    else:
        return say(f"pushed: {made.url}")
    private = " --private" if repository.private else ""
    again = f"dist-subspace push {shlex.quote(str(adapter.parent))} {repository.name}{private}"
    say(f"warning: the adapter was not pushed ({reason}); `{again}` does it")
