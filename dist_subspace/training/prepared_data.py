"""The tokens of a run on every rank: made by rank 0 for all that see its disk, and by the first rank of every other node."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_subspace.config import Config
from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import agreed, gather_objects, of_everyone, refuse_unlike, world
from dist_subspace.placement.shared_folders import look_anew, seen_by_ranks
from dist_subspace.run_folder.folder import RunFolder
from dist_subspace.run_folder.local import local_folder
from dist_subspace.training.data import Prepared, prepare
from dist_subspace.training.data.fingerprint import tokenizer_digest
from dist_subspace.training.data.settings import DataSettings
from dist_subspace.training.data.sources import Facts, open_sources
from dist_subspace.training.sections import data_settings


def prepare_data(config: Config, tokenizer: Any, run_is_seen: Sequence[bool]) -> Prepared:
    """Collective: the run's data, tokenised, alike on every rank.

    They lie in RUN, or where a rank does not see that, in its own node's folder of the run; in `data.cache_dir` where it is
    given. Only the ranks that tokenise read the data.

    Arguments:
        run_is_seen: which ranks see RUN (`seen_by_ranks`).

    Raises:
        UsageError: data that cannot be read; a node whose data or tokenizer are not rank 0's, by name.
    """
    settings = data_settings(config.data)
    with agreed("reading the tokenizer"):
        facts = _decisive(settings, tokenizer)
    refuse_unlike(facts)
    seen = run_is_seen if config.data.cache_dir is None else seen_by_ranks(config.data.cache_dir)
    is_seen = seen[world().rank]
    makes = world().is_main or (world().local_rank == 0 and not is_seen)
    with agreed("reading the data"):
        folder = _place(config, is_seen, makes)
        sources = open_sources(settings) if makes else []
    known = _compared([source.facts for source in sources])
    seed, task = config.training.seed, config.model.task
    with agreed("tokenising the data"):
        if makes:
            prepare(settings, tokenizer, folder, seed, show_progress=world().is_main, task=task, sources=sources)
    with agreed("reading the tokenised data"):
        look_anew(folder)
        found = [facts.tokenised() for facts in known]
        return prepare(settings, tokenizer, folder, seed, show_progress=False, task=task, sources=found)


def _decisive(settings: DataSettings, tokenizer: Any) -> dict[str, Any]:
    """What the keys of `data` that may differ between nodes must have in common."""
    evaluated = "data of its own" if isinstance(settings.eval, str) else settings.eval
    return {
        "number of files in data.train": len(settings.sources()),
        "data.eval": evaluated,
        "tokenizer": tokenizer_digest(tokenizer)[:12],
    }


def _place(config: Config, is_seen: bool, makes: bool) -> Path:
    """Local: where this rank's tokens lie."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    if is_seen:
        return RunFolder(config.run.output_dir).tokens
    local = local_folder(config.run.local_dir, config.run.output_dir)
    if makes:
        local.make()
    return local.tokens


def _compared(found: list[Facts]) -> list[Facts]:
    """Collective: rank 0's sources, which are those of every rank that has read the data, too.

    Raises:
        UsageError: on every rank; names the host and the file that hold something else.
    """
    (first_host, first), *others = gather_objects((socket.gethostname(), found))
    for rank, (host, theirs) in enumerate(others, start=1):
        for ours, other in zip(first, theirs):
            if other.content != ours.content:
                raise of_everyone(
                    UsageError(
                        f"{other.field} is {other.name!r} on {host} (rank {rank}), which holds other data than {ours.name!r} on "
                        f"{first_host} (rank 0); accepted: the same data on every node"
                    )
                )
    return first
