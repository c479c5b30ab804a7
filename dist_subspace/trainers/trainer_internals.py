"""The steps of transformers' Trainer that write and read checkpoints, and have no public name.

Read against transformers 5.23.0 (`trainer.py`) and deepspeed 0.19.8 (`runtime/engine.py`); what is overridden is called by
Trainer itself, and tests/trainers/test_trainer_internals.py fails when one of these steps moves.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from torch import nn

from dist_subspace.interchange.description import CONFIG, OWN_CONFIG, WEIGHTS
from dist_subspace.trainers.state import restore_schedule, restore_values

# What follows in the order of resolution is a Trainer, whichever.
_Next: Any = object


class CheckpointSteps(_Next):  # type: ignore[misc]
    """Checkpoints without the frozen base, and what reads them.

    is_writing_checkpoint: whether `save_model` is called for a checkpoint, and not by a user.
    """

    is_writing_checkpoint = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.is_writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_writing_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Collective with DeepSpeed, whose engine writes the module's weights too: the trained ones alone."""
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with _frozen_left_out(self.model):
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Collective; of trainings without DeepSpeed."""
        restore_values(self.model, Path(resume_from_checkpoint))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with _frozen_not_missed(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Collective where there is a checkpoint: the last step of reading one, with DeepSpeed and without."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            restore_schedule(self.model, Path(checkpoint))

    def _load_best_model(self) -> None:
        """Collective."""
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled:
            with _frozen_not_missed(self.model):
                super()._load_best_model()
        else:
            restore_values(self.model, Path(best))
        restore_schedule(self.model, Path(best))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer copies PEFT's files of an adapter for the Hub, and does not know ours."""
        if self.is_world_process_zero():
            for name in (CONFIG, WEIGHTS, OWN_CONFIG):
                shutil.copy(Path(checkpoint_folder) / name, Path(self.args.output_dir) / name)
        super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _frozen_left_out(model: nn.Module) -> Iterator[None]:
    """Within the block the model's `state_dict` has no frozen parameter, under none of its names (tied ones have several)."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in _frozen_names(model):
            state.pop(f"{prefix}{name}", None)

    handle = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen_not_missed(model: nn.Module) -> Iterator[None]:
    """Within the block `load_state_dict` does not miss a frozen parameter, however strict it is."""
    frozen = _frozen_names(model)

    def let_be(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]

    handle = model.register_load_state_dict_post_hook(let_be)
    try:
        yield
    finally:
        handle.remove()


def _frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
