"""Checkpoints that rank 0 does not see: where each node has a disk of its own, a run goes on where its checkpoints are."""

from __future__ import annotations

import socket

from dist_subspace.errors import UsageError
from dist_subspace.placement.collectives import agreed, gather_objects, of_everyone
from dist_subspace.placement.shared_folders import look_anew
from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder, checkpoint_name


def refuse_newer_elsewhere(run: RunFolder, resume: str | None) -> None:
    """Collective: with `resume` auto, rank 0's checkpoints are the newest that any rank sees in the run's folder. A run whose
    first rank has come to another node would begin anew, or lose steps, without a word.

    Raises:
        UsageError: on every rank; names the host that has a newer one, and rank 0's.
    """
    if resume != "auto":
        return
    with agreed("looking for checkpoints"):
        newest = _newest(run)
    (first_host, first), *others = gather_objects((socket.gethostname(), newest))
    step, host, rank = max(((step, host, rank) for rank, (host, step) in enumerate(others, 1)), default=(0, "", 0))
    if step > first:
        here = f"nothing after {checkpoint_name(first)}" if first else "none"
        raise of_everyone(
            UsageError(
                f"run.output_dir is {str(run)!r}, where {host} (rank {rank}) has {checkpoint_name(step)} and {first_host}, where "
                f"rank 0 is, has {here}; accepted: rank 0 started on {host}, the folder copied to {first_host}, another "
                "run.output_dir, or checkpoint.resume=none to begin anew"
            )
        )


def _newest(run: RunFolder) -> int:
    """Local: the step of the newest checkpoint with a manifest; 0 for none."""
    look_anew(run)
    steps = [step for step, path in run.checkpoints().items() if CheckpointFolder(path).manifest.is_file()]
    return max(steps, default=0)
