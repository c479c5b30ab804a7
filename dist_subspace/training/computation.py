"""The type of the computation where nobody gave one: what all ranks' processors multiply fast, and what a run has begun with."""

from __future__ import annotations

import torch

from dist_subspace.config import Config
from dist_subspace.loading.computation_type import SLOW, unset_type
from dist_subspace.loading.load import resolve_dtype
from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder
from dist_subspace.run_folder.saved_config import saved_sections
from dist_subspace.storage import storage_info


def settled_dtype(config: Config, begun_with: str | None, device: torch.device) -> tuple[Config, torch.dtype]:
    """Collective: the configuration with its `model.dtype`, and the type that it means. A packed storage says none of its own: it
    is float32 where a rank computes on a processor that would be slow in 16 bits. A run that goes on keeps what it has.

    Arguments:
        begun_with: the type of a run that goes on.
    """
    model = config.model
    if model.dtype is None and storage_info(model.storage).dtype is None:
        slow = unset_type(model.storage, device, together=True) == SLOW
        dtype = begun_with or (str(SLOW).removeprefix("torch.") if slow else None)
        if dtype is not None:
            config = config.model_copy(update={"model": model.model_copy(update={"dtype": dtype})})
    return config, resolve_dtype(config.model.storage, config.model.dtype)


def dtype_begun_with(run_dir: RunFolder, resume: str) -> str | None:
    """Local, rank 0: the type in the configuration of the run that goes on; None where one begins. Before it was recorded, it was
    bfloat16."""
    if resume == "none" or (resume == "auto" and not run_dir.checkpoints()):
        return None
    begun = run_dir if resume == "auto" else CheckpointFolder(resume).run
    stored = saved_sections(begun).get("model", {}).get("dtype")
    return str(stored) if stored else "bfloat16"
